"""`apply` against torchvision's functional transforms, image by image with the same parameters.

Torchvision runs in float64 here, so that differences are the errors of `apply`. Both the compiled form (the
CPU's) and the batched one (every other device's) are held to it.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torchvision.transforms.v2.functional as F
from torch import Tensor
from torchvision.transforms import InterpolationMode

from dbd_dist.data import augment
from dbd_dist.data.augment import AugmentConfig, Params, transform
from dbd_dist.data.augment.batched import apply_batched, make_plan

STILL = replace(augment.none(), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))  # shows pixels in 0-1
GREY_LEVEL = 1 / 255
PADDING = {"reflect": "reflect", "zeros": "constant"}
SIZES = [(16, 16), (32, 32), (28, 45)]


def draw(config: AugmentConfig, images_BCHW: Tensor, seed: int = 0) -> Params:
    count, _, height, width = images_BCHW.shape
    generator = torch.Generator().manual_seed(seed)
    return augment.draw(config, count, height=height, width=width, generator=generator)


def random_images(count: int, height: int, width: int) -> Tensor:
    """Noise, which shows every misplaced pixel, and black, grey and white images, where hue is undefined."""
    generator = torch.Generator().manual_seed(height * width)
    images_BHWC = torch.randint(0, 256, (count, height, width, 3), dtype=torch.uint8, generator=generator)
    for i, level in enumerate((0, 128, 255)[: count - 1]):
        images_BHWC[i] = level
    return images_BHWC.permute(0, 3, 1, 2)


def batched(config: AugmentConfig, images_BCHW: Tensor, params: Params) -> Tensor:
    plan = make_plan(params, images_BCHW.device)
    return apply_batched(config, images_BCHW.permute(0, 2, 3, 1).contiguous(), plan).permute(0, 3, 1, 2)


def one_by_one(config: AugmentConfig, images_BCHW: Tensor, params: Params) -> Tensor:
    return torch.stack([_oracle(config, image, params, i) for i, image in enumerate(images_BCHW)])


def _oracle(config: AugmentConfig, image_CHW: Tensor, params: Params, i: int) -> Tensor:
    x_CHW = image_CHW.double() / 255
    height, width = x_CHW.shape[1:]
    top, left, h, w = params.box_B4[i].tolist()
    if config.crop == "random_resized":
        mode = InterpolationMode(config.interpolation)
        x_CHW = F.resized_crop(x_CHW, top, left, h, w, [height, width], interpolation=mode, antialias=True)
        x_CHW = x_CHW.clamp(0, 1)  # as the conversion back to bytes does
    elif config.crop == "pad":
        x_CHW = F.pad(x_CHW, [config.pad_px] * 4, padding_mode=PADDING[config.padding])
        x_CHW = F.crop(x_CHW, top + config.pad_px, left + config.pad_px, height, width)
    if params.flip_B[i]:
        x_CHW = F.horizontal_flip(x_CHW)
    if params.jitter_B[i]:
        adjust = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
        for operation in params.order_B4[i].tolist():
            x_CHW = adjust[operation](x_CHW, params.factor_B4[i, operation].item())
    if params.grayscale_B[i]:
        x_CHW = F.rgb_to_grayscale(x_CHW, num_output_channels=3)
    if params.blur_B[i]:
        kernel_px, sigma = augment.blur_kernel_px(config, height, width), params.sigma_B[i].item()
        x_CHW = F.gaussian_blur(x_CHW, [kernel_px, kernel_px], [sigma, sigma])
    return F.normalize(x_CHW, list(config.mean), list(config.std))


@pytest.mark.parametrize("form", [augment.apply, batched])
@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize(
    "config",
    [
        replace(STILL, crop="random_resized"),
        replace(STILL, crop="random_resized", interpolation="bilinear"),
        replace(STILL, crop="random_resized", scale=(0.01, 0.1)),
        replace(STILL, crop="pad"),
        replace(STILL, crop="pad", pad_px=11, flip_p=0.5),
        replace(STILL, crop="pad", pad_px=11, flip_p=0.5, padding="zeros"),
        replace(STILL, flip_p=0.5),
        replace(STILL, jitter_p=1.0),
        replace(STILL, jitter_p=1.0, jitter=(2.0, 2.0, 2.0, 0.5)),
        replace(STILL, grayscale_p=0.5),
        replace(STILL, blur_p=0.8),
        replace(STILL, blur_p=0.8, blur_kernel="full"),
        replace(STILL, blur_p=0.8, blur_kernel="full", blur_sigma=(0.1, 9.0)),
    ],
    ids=[
        "bicubic",
        "bilinear",
        "tiny-box",
        "pad",
        "pad-flip",
        "pad-zeros",
        "flip",
        "jitter",
        "wild-jitter",
        "gray",
        "blur",
        "blur-full",
        "blur-as-far-as-the-image",
    ],
)
def test_every_operation_agrees_with_torchvision(form, config, height, width):
    images_BCHW = random_images(12, height, width)
    params = draw(config, images_BCHW)
    expected = one_by_one(config, images_BCHW, params)
    difference = (form(config, images_BCHW, params) - expected).abs().max().item()
    assert difference < 1e-3 * GREY_LEVEL


@pytest.mark.parametrize("form", [augment.apply, batched])
@pytest.mark.parametrize("size", [(224, 224), (96, 130)])
def test_large_images_agree_with_torchvision(form, size):
    """One noise image of each size, as torchvision is slow here."""
    config = replace(augment.simclr(), mean=STILL.mean, std=STILL.std, blur_p=1.0, blur_sigma=(0.1, 3.0))
    images_BCHW = random_images(3, *size)[2:]
    params = draw(config, images_BCHW)
    difference = form(config, images_BCHW, params) - one_by_one(config, images_BCHW, params)
    assert difference.abs().max().item() < 1e-3 * GREY_LEVEL


@pytest.mark.parametrize("form", [augment.apply, batched])
@pytest.mark.parametrize("make", [augment.simclr, augment.weak_pad, augment.weak_resized, augment.none])
def test_whole_augmentations_agree_with_torchvision(form, make):
    config = make(mean=augment.IMAGENET_MEAN, std=augment.IMAGENET_STD)
    images_BCHW = random_images(32, 32, 32)
    params = draw(config, images_BCHW)
    torch.testing.assert_close(
        form(config, images_BCHW, params).double(), one_by_one(config, images_BCHW, params), atol=2e-5, rtol=0
    )


def test_byte_pipeline_of_torchvision_differs_by_rounding_only():
    config = replace(STILL, crop="random_resized", flip_p=0.5)
    # Smooth, for torchvision also clamps between the two axes where a sharp edge overshoots.
    coarse = torch.rand(16, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    images_BCHW = (F.resize(coarse, [32, 32]) * 255).byte()
    params = draw(config, images_BCHW)
    ours = augment.apply(config, images_BCHW, params)
    for i, image in enumerate(images_BCHW):
        theirs = F.resized_crop(image, *params.box_B4[i].tolist(), [32, 32], interpolation=InterpolationMode.BICUBIC)
        theirs = F.horizontal_flip(theirs) if params.flip_B[i] else theirs
        assert (ours[i] - theirs / 255).abs().max() < 1.5 * GREY_LEVEL


def test_hand_drawn_image():
    images_BCHW = torch.arange(12, dtype=torch.uint8).view(1, 1, 3, 4).repeat(1, 3, 1, 1)
    params = draw(STILL, images_BCHW)
    params = replace(params, box_B4=torch.tensor([[-1, 1, 3, 4]]), flip_B=torch.tensor([True]))
    shown = augment.apply(replace(STILL, crop="pad", pad_px=1), images_BCHW, params)[0, 0] * 255
    torch.testing.assert_close(shown, torch.tensor([[6.0, 7, 6, 5], [2, 3, 2, 1], [6, 7, 6, 5]]))


@pytest.mark.parametrize("make", [augment.simclr, augment.weak_pad, augment.weak_resized, augment.none])
def test_parts_of_a_batch_are_bit_equal_to_the_whole(make):
    config = make()
    images_BCHW = random_images(40, 32, 32)
    params = draw(config, images_BCHW)
    whole = augment.apply(config, images_BCHW, params)
    assert torch.equal(whole, augment.apply(config, images_BCHW, params))
    parts = [augment.apply(config, images_BCHW[a:b], params[a:b]) for a, b in ((0, 1), (1, 19), (19, 40))]
    assert torch.equal(whole, torch.cat(parts))
    index = torch.tensor([7, 3, 3, 39])
    assert torch.equal(whole[index], augment.apply(config, images_BCHW[index], params[index]))
    assert torch.equal(whole[::2], augment.apply(config, images_BCHW[::2], params[::2]))


def test_batched_parts_agree_with_the_whole(monkeypatch):
    """Bit equality is beyond matrix products, whose summing order may depend on the batch."""
    config = augment.simclr()
    images_BCHW = random_images(40, 32, 32)
    params = draw(config, images_BCHW)
    whole = batched(config, images_BCHW, params)
    monkeypatch.setattr("dbd_dist.data.augment.batched._CHUNK_VALUES", 7 * 3 * 32 * 32)  # chunks of 7 images
    torch.testing.assert_close(batched(config, images_BCHW, params), whole, atol=1e-5, rtol=0)
    torch.testing.assert_close(batched(config, images_BCHW[5:9], params[5:9]), whole[5:9], atol=1e-5, rtol=0)


def test_result_does_not_depend_on_threads():
    config = augment.simclr()
    images_BCHW = random_images(150, 32, 32)
    params = draw(config, images_BCHW)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = augment.apply(config, images_BCHW, params)
        torch.set_num_threads(3)
        three = augment.apply(config, images_BCHW, params)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one, three)


@pytest.mark.parametrize("config", [augment.simclr(), augment.weak_pad(), augment.none()])
def test_layout_type_and_untouched_input(config):
    images_BCHW = random_images(5, 24, 16)
    before = images_BCHW.clone()
    params = draw(config, images_BCHW)
    out_BCHW = augment.apply(config, images_BCHW, params)
    assert out_BCHW.shape == images_BCHW.shape
    assert out_BCHW.dtype == torch.float32
    assert out_BCHW.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images_BCHW, before)
    planar = images_BCHW.contiguous(memory_format=torch.contiguous_format)
    assert torch.equal(out_BCHW, augment.apply(config, planar, params))


def test_normalise_is_the_augmentation_that_does_nothing():
    config = augment.none(mean=augment.IMAGENET_MEAN, std=augment.IMAGENET_STD)
    images_BCHW = random_images(9, 20, 30)
    out_BCHW = augment.normalise(config, images_BCHW)
    assert out_BCHW.is_contiguous(memory_format=torch.channels_last)
    expected = F.normalize(images_BCHW / 255, list(config.mean), list(config.std))
    torch.testing.assert_close(out_BCHW, expected, atol=2e-6, rtol=0)
    torch.testing.assert_close(
        out_BCHW, augment.apply(config, images_BCHW, draw(config, images_BCHW)), atol=2e-6, rtol=0
    )


@pytest.mark.parametrize("config", [augment.simclr(), augment.weak_pad(), augment.weak_resized(), augment.none()])
def test_other_devices_are_never_waited_for(config):
    """On the meta device, which has shapes and no values, every look at a value on the host is an error."""
    images_BCHW = random_images(12, 32, 32)
    params = draw(config, images_BCHW)
    out_BCHW = augment.apply(config, images_BCHW.to("meta"), params)
    assert out_BCHW.shape == images_BCHW.shape
    assert out_BCHW.device.type == augment.normalise(config, images_BCHW.to("meta")).device.type == "meta"


def test_autocast_leaves_the_precision_alone():
    config = augment.simclr()
    images_BCHW = random_images(12, 32, 32)
    params = draw(config, images_BCHW)
    expected = batched(config, images_BCHW, params)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(batched(config, images_BCHW, params), expected)


def test_images_must_fit_the_parameters():
    images_BCHW = random_images(4, 16, 16)
    params = draw(STILL, images_BCHW)
    with pytest.raises(AssertionError, match="parameters are for"):
        augment.apply(STILL, images_BCHW[:3], params)
    with pytest.raises(AssertionError, match="not uint8"):
        augment.apply(STILL, images_BCHW.float(), params)


def test_a_numba_that_refuses_the_numpy_beside_it_is_none(monkeypatch):
    def refuse(name: str) -> None:
        raise ImportError("Numba needs NumPy 2.4 or less. Got NumPy 2.5.")

    monkeypatch.setattr(transform.importlib, "import_module", refuse)
    assert not transform._has_numba.__wrapped__()


@pytest.mark.parametrize("form", [augment.apply, batched])
@pytest.mark.parametrize(
    ("kernel", "px", "deviation", "peak"), [("simclr", 1, 0.7990, 0.3617), ("full", 6, 1.9878, 0.1997)]
)
def test_how_far_a_blur_of_two_pixels_reaches(form, kernel, px, deviation, peak):
    """One white pixel: its neighbours show the kernel exp(-t^2 / 8), cut off `px` from the middle and made to sum to 1.
    Unbounded, its deviation is 2 and its peak 1 / (2 sqrt(2 pi)) = 0.1995."""
    config = replace(STILL, blur_p=1.0, blur_sigma=(2.0, 2.0), blur_kernel=kernel)
    images_BCHW = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    images_BCHW[:, :, 16, 16] = 255
    column = form(config, images_BCHW, draw(config, images_BCHW))[0, 0].sum(dim=0).double()
    at = torch.arange(32.0) - 16
    assert column[at.abs() > px].abs().max() < 1e-6
    assert column.sum().item() == pytest.approx(1, abs=1e-5)
    assert column[16].item() == pytest.approx(peak, abs=2e-4)
    assert (column * at**2).sum().sqrt().item() == pytest.approx(deviation, abs=2e-4)


@pytest.mark.parametrize(
    ("sigma", "size", "px"), [(2.0, 32, 13), (2.0, 224, 13), (0.1, 32, 3), (9.0, 32, 55), (2.0, 7, 11), (2.0, 2, 3)]
)
def test_kernel_of_the_full_blur_is_three_sigma_within_the_image(sigma, size, px):
    config = replace(STILL, blur_kernel="full", blur_sigma=(0.1, sigma))
    assert augment.blur_kernel_px(config, size, size + 3) == px
