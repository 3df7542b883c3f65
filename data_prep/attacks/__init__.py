"""Backdoor attacks: what an attacker does to images and labels. One attack a file: a pure function, uint8 in, uint8
out, and a frozen config that says whom it poisons, with what label. A new one is one more line here."""

from data_prep.attacks.adap_blend import AdapBlend, adap_blend
from data_prep.attacks.adap_patch import AdapPatch, adap_patch
from data_prep.attacks.attack import Attack, NoAttack, PoisonLabel, Trigger
from data_prep.attacks.badnets import BadNets, badnets, checkerboard
from data_prep.attacks.blended import Blended, blended
from data_prep.attacks.crafted import Crafted, OptimisedPattern, PerturbedImages
from data_prep.attacks.ctrl import Ctrl, ctrl
from data_prep.attacks.protocols import PROTOCOLS, Protocol, ProtocolName
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
        "ctrl": Ctrl,
    },
    base=Attack,
    needs=("name",),
)
"""Name -> class, as `dbd prepare SOURCE NAME` has it."""

__all__ = [
    "ATTACKS",
    "PROTOCOLS",
    "AdapBlend",
    "AdapPatch",
    "Attack",
    "BadNets",
    "Blended",
    "Crafted",
    "Ctrl",
    "NoAttack",
    "OptimisedPattern",
    "PerturbedImages",
    "PoisonLabel",
    "Protocol",
    "ProtocolName",
    "Sig",
    "Trigger",
    "WaNet",
    "adap_blend",
    "adap_patch",
    "badnets",
    "blended",
    "checkerboard",
    "ctrl",
    "sig",
    "wanet",
]
