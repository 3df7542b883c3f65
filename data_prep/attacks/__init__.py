"""Backdoor triggers: what an attacker does to images and labels. One attack a file: a pure function, uint8 in, uint8
out, and a frozen config that says whom it poisons, with what label. A new attack is one more of each."""

from data_prep.attacks.adap import AdapBlend, AdapPatch, adap_blend, adap_patch
from data_prep.attacks.attack import Attack, NoAttack, PoisonLabel, Trigger
from data_prep.attacks.badnets import BadNets, badnets, checkerboard
from data_prep.attacks.blended import Blended, blended
from data_prep.attacks.crafted import Crafted, OptimisedPattern, PerturbedImages
from data_prep.attacks.protocols import SETTINGS, Setting, SettingName
from data_prep.attacks.sig import Sig, sig
from data_prep.attacks.wanet import WaNet, wanet
from data_prep.registry import Registry

ATTACKS: Registry[type[Attack]] = Registry(
    "attacks",
    {
        "clean": NoAttack,
        "badnets": BadNets,
        "blended": Blended,
        "wanet": WaNet,
        "sig": Sig,
        "adap-blend": AdapBlend,
        "adap-patch": AdapPatch,
    },
    base=Attack,
    needs=("name",),
)

__all__ = [
    "ATTACKS",
    "SETTINGS",
    "AdapBlend",
    "AdapPatch",
    "Attack",
    "BadNets",
    "Blended",
    "Crafted",
    "NoAttack",
    "OptimisedPattern",
    "PerturbedImages",
    "PoisonLabel",
    "Setting",
    "SettingName",
    "Sig",
    "Trigger",
    "WaNet",
    "adap_blend",
    "adap_patch",
    "badnets",
    "blended",
    "checkerboard",
    "sig",
    "wanet",
]
