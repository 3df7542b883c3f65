"""The attacker's side: the adaptive attack against the defence."""

from tune_spaces.space import Space, choice, integer, loguniform, uniform

ADAPTIVE = Space(
    vary={
        "craft.optimise": choice("pattern", "pattern-and-mask"),
        "craft.patch_px": choice(None, 4, 8),
        "craft.alpha": loguniform(0.05, 1.0),
        "craft.mask_budget": loguniform(0.005, 0.3),
        "craft.distance": choice("l2", "cosine"),
        "craft.separation": uniform(0.0, 2.0),
        "craft.steps": integer(100, 1000),
        "prepare.rate": loguniform(0.01, 0.1),
    },
    smoke={"craft.alpha": choice(0.1, 0.2), "craft.steps": choice(5), "prepare.rate": choice(0.05)},
    why="the attacker's choices: a fixed or an optimised mask, its size and strength, how features are compared and "
    "how much it counts to leave the other classes, steps, a poison rate up to twice the paper's; triggers that are "
    "more visible than the bound are not trained on",
    search="tpe",
    trials=12,
    attacks=True,
)
