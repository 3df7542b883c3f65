"""Making what the attacks need that have a trained model: perturbed images (label-consistent), an optimised trigger
(adaptive).

The attacker's side of the project; nothing of the defence imports it.
"""
