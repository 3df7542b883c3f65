"""The augmentation as operations on whole batches, on any device, without a wait for that device.

Resizing and blurring are separable, so each is two batched matrix products with one small matrix per image
and axis; the flip, the reflection at the edges and the scaling of bytes to 0-1 sit in those matrices. Images
are sorted on the host by the place of the hue shift in their jitter: brightness, contrast and saturation are
all of the form clamp(f * image + g * gray + c), so only the hue shift needs code and slices of its own. In
TF32, where a program allows it, matrix products should err by up to about half a grey level.

The CPU has its own, faster form in compiled.py; the tests hold both to the same results.
"""

from __future__ import annotations

import functools
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from dbd_dist.data.augment.config import AugmentConfig, blur_kernel_px
from dbd_dist.data.augment.params import CONTRAST, HUE, SATURATION, Params

GRAY = (0.2989, 0.587, 0.114)  # luma weights of torchvision's rgb_to_grayscale (ITU-R BT.601)
_CHUNK_VALUES = 1 << 26  # values worked on at once: bounds the memory of some ten intermediate results to 3 GB


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """Params as the batched operations need them: sorted by the place of the hue shift, on the device."""

    bounds: list[int]
    """Where, in sorted order, the images without jitter end, and those with the hue shift first to last."""
    any_grayscale: bool
    any_blur: bool
    sorted_B: Tensor
    """Position in the batch of each image of the sorted order (int64)."""
    box_B4: Tensor
    """As in Params, sorted and float32, as all below."""
    flip_B: Tensor
    hue_B: Tensor
    """Hue shift in turns."""
    blend_B33: Tensor
    """For each of three steps, the f, g and c of clamp(f * image + g * gray + c * mean(gray))."""
    grayscale_B: Tensor
    blur_B: Tensor
    sigma_B: Tensor


def make_plan(params: Params, device: torch.device, non_blocking: bool = True) -> Plan:
    """Sort the images on the host and send everything in one copy."""
    count = len(params)
    place_B = (params.order_B4 == HUE).to(torch.uint8).argmax(dim=1)
    group_B = torch.where(params.jitter_B, place_B + 1, 0)
    sorted_B = group_B.argsort(stable=True)
    bounds = torch.bincount(group_B, minlength=5).cumsum(0).tolist()

    order_B3 = params.order_B4[params.order_B4 != HUE].view(count, 3)
    factor_B3 = params.factor_B4.gather(1, order_B3)
    rest_B3 = 1 - factor_B3
    blend_B33 = torch.stack([factor_B3, rest_B3 * (order_B3 == SATURATION), rest_B3 * (order_B3 == CONTRAST)], dim=2)
    columns = [
        params.box_B4,
        params.flip_B[:, None],
        params.factor_B4[:, HUE, None],
        blend_B33.flatten(1),
        params.grayscale_B[:, None],
        params.blur_B[:, None],
        params.sigma_B[:, None],
    ]
    packed_BC = torch.cat([c.float() for c in columns], dim=1)[sorted_B]
    packed_BC = torch.cat([packed_BC, sorted_B[:, None].float()], dim=1)  # exact below 2**24 images
    if device.type == "cuda":
        packed_BC = packed_BC.pin_memory()  # a copy from pageable memory would wait for the device
    packed_BC = packed_BC.to(device, non_blocking=non_blocking)
    box_B4, rest_BC = packed_BC[:, :4], packed_BC[:, 4:]
    return Plan(
        bounds=bounds,
        any_grayscale=bool(params.grayscale_B.any()),
        any_blur=bool(params.blur_B.any()),
        sorted_B=packed_BC[:, -1].long(),
        box_B4=box_B4,
        flip_B=rest_BC[:, 0],
        hue_B=rest_BC[:, 1],
        blend_B33=rest_BC[:, 2:11].reshape(count, 3, 3),
        grayscale_B=rest_BC[:, 11],
        blur_B=rest_BC[:, 12],
        sigma_B=rest_BC[:, 13],
    )


@torch.no_grad()
def apply_batched(config: AugmentConfig, images_BHWC: Tensor, plan: Plan) -> Tensor:
    """Augment uint8 images; returns normalised float32 images (B, H, W, C)."""
    device_type = images_BHWC.device.type
    knows_autocast = torch.amp.is_autocast_available(device_type)
    # Autocast's matrix products in bfloat16 could not even tell bytes apart.
    with torch.autocast(device_type, enabled=False) if knows_autocast else nullcontext():
        return _apply_chunks(config, images_BHWC, plan)


def _apply_chunks(config: AugmentConfig, images_BHWC: Tensor, plan: Plan) -> Tensor:
    count, height, width, _ = images_BHWC.shape
    device = images_BHWC.device
    out_BHWC = torch.empty(images_BHWC.shape, dtype=torch.float32, device=device)
    gain_C, offset_C = affine(config, device)
    chunk = max(1, _CHUNK_VALUES // (3 * height * width))
    for start in range(0, count, chunk):
        part = slice(start, min(start + chunk, count))
        x_BCHW = images_BHWC.index_select(0, plan.sorted_B[part]).permute(0, 3, 1, 2).float()
        x_BCHW = _crop_flip(config, x_BCHW.contiguous(), plan.box_B4[part], plan.flip_B[part])
        lower = plan.bounds[0]
        for place, upper in enumerate(plan.bounds[1:]):
            inner = slice(max(lower, part.start), min(upper, part.stop))
            if inner.start < inner.stop:
                here = slice(inner.start - start, inner.stop - start)
                x_BCHW[here] = _jitter(x_BCHW[here], place, plan.blend_B33[inner], plan.hue_B[inner])
            lower = upper
        if plan.any_grayscale:
            bit_B111 = plan.grayscale_B[part, None, None, None] > 0
            x_BCHW = torch.where(bit_B111, _gray(x_BCHW)[:, None], x_BCHW)
        if plan.any_blur:
            x_BCHW = _blur(config, x_BCHW, plan.blur_B[part], plan.sigma_B[part])
        x_BCHW = torch.addcmul(offset_C[:, None, None], x_BCHW, gain_C[:, None, None])
        out_BHWC.index_copy_(0, plan.sorted_B[part], x_BCHW.permute(0, 2, 3, 1))
    return out_BHWC


def normalise_batched(config: AugmentConfig, images_BHWC: Tensor) -> Tensor:
    """Normalise uint8 images; returns float32 images (B, H, W, C)."""
    width = images_BHWC.shape[2]
    gain_C, offset_C = affine(config, images_BHWC.device)
    # Whole rows as the innermost dimension: over 3 channels alone the arithmetic does not vectorise.
    rows_BHR = images_BHWC.flatten(2).float()
    rows_BHR.mul_(gain_C.repeat(width) / 255).add_(offset_C.repeat(width))
    return rows_BHR.view(images_BHWC.shape)


@functools.cache
def affine(config: AugmentConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """Factor and offset of each channel that normalise pixels in 0-1. Kept, and not to be changed: a copy to the device
    for every batch would cost more than the arithmetic."""
    mean_C, std_C = (
        torch.tensor(config.mean, dtype=torch.float64),
        torch.tensor(config.std, dtype=torch.float64),
    )
    both_2C = torch.stack([1 / std_C, -mean_C / std_C]).float()
    if device.type == "cuda":
        both_2C = both_2C.pin_memory()
    gain_C, offset_C = both_2C.to(device, non_blocking=True).unbind(0)
    return gain_C, offset_C


def _crop_flip(config: AugmentConfig, x_BCHW: Tensor, box_B4: Tensor, flip_B: Tensor) -> Tensor:
    """Crop, resize to the old size, flip; from 0-255 to 0-1."""
    top_B, left_B, h_B, w_B = box_B4.unbind(1)
    height, width = x_BCHW.shape[-2:]
    matrix = _shifted_rows if config.crop == "pad" else _resizing_rows
    rows_BHH = matrix(config, top_B, h_B, torch.zeros_like(flip_B), height) / 255
    columns_BWW = matrix(config, left_B, w_B, flip_B, width)
    x_BCHW = _separable(x_BCHW, rows_BHH, columns_BWW)
    # Bicubic weights are negative in places and overshoot; torchvision clamps when it returns to bytes.
    return x_BCHW.clamp_(0, 1) if config.interpolation == "bicubic" else x_BCHW


def _separable(x_BCHW: Tensor, rows_BHH: Tensor, columns_BWW: Tensor) -> Tensor:
    """rows @ x @ columns.T for every image and channel."""
    b, c, h, w = x_BCHW.shape
    x_BCHW = torch.bmm(x_BCHW.view(b, c * h, w), columns_BWW.mT).view(b, c, h, w)
    return torch.matmul(rows_BHH[:, None], x_BCHW)


def _positions(flip_B: Tensor, size: int) -> Tensor:
    """Pixel numbers 0 to size - 1 (B, size), counted down for images to be flipped."""
    up = torch.arange(size, device=flip_B.device, dtype=torch.float32)
    return torch.where(flip_B[:, None] > 0, size - 1 - up, up)


def _shifted_rows(config: AugmentConfig, start_B: Tensor, size_B: Tensor, flip_B: Tensor, size: int) -> Tensor:
    """Row i of the (size x size) matrices picks pixel start + i; beyond the edges a reflected one, or none."""
    source_BN = start_B[:, None] + _positions(flip_B, size)
    if config.padding == "reflect":
        source_BN = (size - 1) - ((size - 1) - source_BN.abs()).abs()
    pixel = torch.arange(size, device=start_B.device, dtype=torch.float32)
    return (source_BN[:, :, None] == pixel).float()


def _resizing_rows(config: AugmentConfig, start_B: Tensor, size_B: Tensor, flip_B: Tensor, size: int) -> Tensor:
    """Row i of the (size x size) matrices holds the weights of pixel i of the box stretched to `size` pixels.

    A box is never larger than the image, so this only ever enlarges and antialiasing has nothing to do. As in
    Pillow and in torch's antialiased resize, pixels outside the box have no weight and the rest sum to 1.
    """
    start_B1, size_B1 = start_B[:, None], size_B[:, None]
    pixel_N = torch.arange(size, device=start_B.device, dtype=torch.float32)
    # Pixel centres times 2 * size are whole numbers, so that the distances are exact up to the division.
    centre_BN = (2 * _positions(flip_B, size) + 1) * size_B1
    source_BN = (2 * (pixel_N - start_B1) + 1) * size
    distance_BNN = (source_BN[:, None] - centre_BN[:, :, None]).abs() / (2 * size)
    if config.interpolation == "bilinear":
        weight_BNN = (1 - distance_BNN).clamp(min=0)
    else:  # Keys' cubic convolution with a = -0.5, as Pillow has it: zero from a distance of 2 on
        d = distance_BNN.clamp(max=2)
        near, far = (1.5 * d - 2.5) * d * d + 1, ((-0.5 * d + 2.5) * d - 4) * d + 2
        weight_BNN = torch.where(d < 1, near, far)
    inside_BN = (pixel_N >= start_B1) & (pixel_N < start_B1 + size_B1)
    weight_BNN = weight_BNN * inside_BN[:, None]
    return weight_BNN / weight_BNN.sum(dim=2, keepdim=True)


def _gray(x_BCHW: Tensor) -> Tensor:
    r, g, b = x_BCHW.unbind(1)
    return GRAY[0] * r + GRAY[1] * g + GRAY[2] * b


def _jitter(x_BCHW: Tensor, hue_place: int, blend_B33: Tensor, hue_B: Tensor) -> Tensor:
    """Three blends, with the hue shift before the blend number `hue_place`, or after the last if it is 3."""
    for step in range(4):
        if step == hue_place:
            x_BCHW = _shift_hue(x_BCHW, hue_B)
        if step < 3:
            f, g, c = blend_B33[:, step, :, None, None].unbind(1)
            gray_BHW = _gray(x_BCHW)
            base_BHW = g * gray_BHW + c * gray_BHW.mean(dim=(1, 2), keepdim=True)
            x_BCHW = torch.addcmul(base_BHW[:, None], x_BCHW, f[:, None]).clamp_(0, 1)
    return x_BCHW


def _shift_hue(x_BCHW: Tensor, hue_B: Tensor) -> Tensor:
    """Turn the hue in HSV space. Value and chroma stay, so that neither sectors nor saturation are needed."""
    r, g, b = x_BCHW.unbind(1)
    highest = torch.maximum(torch.maximum(r, g), b)
    lowest = torch.minimum(torch.minimum(r, g), b)
    chroma = highest - lowest
    red, green = r == highest, g == highest
    difference = torch.where(red, g - b, torch.where(green, b - r, r - g))
    sector = torch.where(red, 0.0, torch.where(green, 2.0, 4.0))
    turned = difference / chroma.clamp(min=1e-12) + sector + 6 * hue_B[:, None, None]  # in sixths of a turn
    turned = turned - 6 * torch.floor(turned / 6)
    share_BCHW = torch.stack([(turned - 3).abs() - 1, 2 - (turned - 2).abs(), 2 - (turned - 4).abs()], dim=1).clamp_(
        0, 1
    )
    return torch.addcmul(lowest[:, None], share_BCHW, chroma[:, None])


def _blur(config: AugmentConfig, x_BCHW: Tensor, blur_B: Tensor, sigma_B: Tensor) -> Tensor:
    """Gaussian blur with reflected edges; images whose bit is not set pass through identity matrices."""
    height, width = x_BCHW.shape[-2:]
    kernel_px = blur_kernel_px(config, height, width)
    tap_K = torch.arange(kernel_px, device=x_BCHW.device, dtype=torch.float32) - kernel_px // 2
    weight_BK = torch.softmax(-0.5 * (tap_K / sigma_B[:, None]) ** 2, dim=1)
    weight_BK = torch.where(blur_B[:, None] > 0, weight_BK, (tap_K == 0).float())

    def rows(size: int) -> Tensor:
        pixel = torch.arange(size, device=x_BCHW.device, dtype=torch.float32)
        source_KN = (pixel + tap_K[:, None]).abs()
        source_KN = (size - 1) - ((size - 1) - source_KN).abs()
        pick_KNN = (source_KN[:, :, None] == pixel).float()
        return (weight_BK @ pick_KNN.view(kernel_px, size * size)).view(-1, size, size)

    return _separable(x_BCHW, rows(height), rows(width))
