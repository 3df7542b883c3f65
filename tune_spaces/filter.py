"""The filtering ratio alone, as in the appendix of the paper (Huang et al. 2022)."""

from tune_spaces.space import Space

FILTER = Space(
    grid={"split.keep": (0.1, 0.3, 0.5, 0.7, 0.9)},
    smoke={"split.keep": (0.2, 0.4, 0.6, 0.8)},
    shared_stage="warmup",
    why="the filtering ratio alone, as in the paper's appendix",
)
