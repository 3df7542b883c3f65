"""The filtering ratio together with the loss that samples are ranked by."""

from tune_spaces.space import Space

SCE = Space(
    grid={
        "split.keep": (0.3, 0.5, 0.7),
        "warmup.sce_alpha": (0.1, 1.0),
        "warmup.sce_beta": (0.1, 1.0),
    },
    smoke={"split.keep": (0.4, 0.6), "warmup.sce_alpha": (0.1, 1.0), "warmup.sce_beta": (0.1, 1.0)},
    shared_stage="simclr",
    why="the filtering ratio and both weights of symmetric cross-entropy",
)
