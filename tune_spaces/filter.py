"""The filter alone, as in the appendix of the paper (Huang et al. 2022)."""

from tune_spaces.space import Space, choice, uniform

FILTER = Space(
    vary={
        "split.keep": uniform(0.1, 0.9, grid=(0.1, 0.3, 0.5, 0.7, 0.9)),
        "split.rule": choice("global", "balanced"),
        "mixmatch.refresh": choice(1, 5),
    },
    smoke={"split.keep": choice(0.2, 0.4, 0.6, 0.8)},
    why="the filter: the fraction that is kept, from a tenth to nine tenths as in the paper's appendix, by one "
    "ranking or one for each class, renewed every epoch as published or every fifth",
)
