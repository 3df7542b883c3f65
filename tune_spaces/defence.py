"""The whole defence after pretraining."""

from tune_spaces.filter import FILTER
from tune_spaces.sce import SCE
from tune_spaces.space import Space, choice, loguniform, uniform

DEFENCE = Space(
    vary={
        **FILTER.vary,
        **SCE.vary,
        "mixmatch.lambda_u": uniform(1.0, 75.0),
        "mixmatch.temperature": uniform(0.2, 1.0),
        "mixmatch.mix_alpha": loguniform(0.1, 2.0),
    },
    smoke={"split.keep": choice(0.4, 0.6), "mixmatch.lambda_u": choice(5.0, 15.0)},
    why="filter and ranking loss together with MixMatch: lambda_u from almost none to the 75 of its paper, sharpening "
    "from strong to none, mixing from hardly any to even",
    search="tpe",
)
