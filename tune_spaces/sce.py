"""The loss that samples are ranked by, and how long the head learns with it."""

from tune_spaces.space import Space, choice, integer, loguniform

SCE = Space(
    vary={
        "warmup.sce_alpha": loguniform(0.01, 10.0, grid=(0.01, 0.1, 1.0, 10.0)),
        "warmup.sce_clamp": loguniform(1e-6, 1e-2, grid=(1e-4,)),
        "warmup.epochs": integer(5, 60, grid=(10, 40)),
        "warmup.lr": loguniform(0.001, 0.02, grid=(0.002, 0.01)),
    },
    smoke={"warmup.sce_alpha": choice(0.01, 0.1, 1.0, 10.0), "split.keep": choice(0.4, 0.6)},
    why="the ranking loss: cross-entropy at a hundredth to ten times the weight of its reverse (beta stays: Adam sees "
    "only the ratio), what stands for log 0, and epochs and rate of the warm-up around the presets' values",
)
