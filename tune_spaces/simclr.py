"""The self-supervised stage, which everything else stands on."""

from tune_spaces.space import Space, choice, logint, loguniform, uniform

SIMCLR = Space(
    vary={
        "simclr.temperature": loguniform(0.07, 1.0),
        "simclr.augment.scale.0": uniform(0.08, 0.8),
        "simclr.epochs": logint(50, 400),
        "simclr.batch": choice(128, 256, 512),
        "simclr.lr": loguniform(0.05, 1.0),
        "simclr.weight_decay": loguniform(1e-6, 1e-3),
    },
    smoke={"simclr.temperature": choice(0.2, 0.5), "simclr.augment.scale.0": choice(0.2, 0.4)},
    why="pretraining: temperatures between MoCo's 0.07 and 1, crops from ImageNet's 0.08 of the image upwards, and "
    "epochs, batch, rate and weight decay a few times above and below the published ones",
    search="tpe",
)
