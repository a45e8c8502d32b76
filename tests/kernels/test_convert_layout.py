"""convert_layout: both directions, all pages and some, strides, dtypes, addresses, errors."""

from __future__ import annotations

import pytest
import torch
from support.attention import FAR, far_memory

from llama4_triton.kernels import reference
from llama4_triton.kernels.convert_layout import (
    ConvertLayoutConfig,
    convert_layout,
    default_config,
)

BF16, F16, F32, E4M3 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn
SMALL = ConvertLayoutConfig(BLOCK_S=4, BLOCK_D=8, num_warps=1)


def _random(shape, dtype, device):
    """Any bit patterns, NaN among them."""
    bits = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8)
    return bits.view(dtype).squeeze(-1).to(device)


def _bits(x):
    return x.contiguous().unsqueeze(-1).view(torch.uint8)


# id: (pages, page_size, Hkv, D, dtype)
SHAPES = {
    "scout-e4m3": (3, 64, 2, 128, E4M3),
    "scout-bf16": (2, 16, 8, 128, BF16),
    "page-256": (1, 256, 1, 64, E4M3),
    "odd-fp32": (3, 5, 3, 24, F32),
    "page-1": (4, 1, 2, 2, F16),
    "D256": (1, 16, 1, 256, BF16),
    "no-page": (0, 16, 1, 64, BF16),
}


@pytest.mark.parametrize("name", [*SHAPES, "odd-fp32-small-tiles"])
def test_both_directions_move_every_bit(device, name):
    config = SMALL if name.endswith("small-tiles") else None
    pages, page, Hkv, D, dtype = SHAPES[name.removesuffix("-small-tiles")]
    v = _random((pages, page, Hkv, D), dtype, device)
    transposed = convert_layout(v, layout="transposed_v", config=config)
    assert transposed.shape == (pages, Hkv, D, page) and transposed.is_contiguous()
    assert torch.equal(_bits(transposed), _bits(v.permute(0, 2, 3, 1)))
    assert torch.equal(_bits(convert_layout(transposed, layout="nhd", config=config)), _bits(v))


@pytest.mark.parametrize("layout", ["nhd", "transposed_v"])
def test_listed_pages_only(device, layout):
    """Ids beyond the cache are skipped; what is not listed keeps its bits."""
    v = _random((6, 16, 2, 8), E4M3, device)
    source = v if layout == "transposed_v" else convert_layout(v, layout="transposed_v")
    shape = (6, 2, 8, 16) if layout == "transposed_v" else (6, 16, 2, 8)
    out = _random(shape, E4M3, device)
    before = out.clone()
    ids = torch.tensor([4, -1, 0, 6, 2**31 - 1], dtype=torch.int32, device=device)
    assert convert_layout(source, layout=layout, out=out, pages=ids) is out
    want = reference.convert_layout(source, layout)
    for page in range(6):
        expected = want if page in (0, 4) else before
        assert torch.equal(_bits(out[page]), _bits(expected[page]))


def test_views_of_a_pool(device):
    """K and V of many layers in one tensor: pages far apart, heads not dense."""
    pool = _random((3, 2, 16, 4, 8), BF16, device)
    v = pool[:, 1, :, 1:3]
    out = convert_layout(v, layout="transposed_v")
    assert torch.equal(_bits(out), _bits(v.permute(0, 2, 3, 1)))


def test_pages_beyond_two_to_the_31(request, device):
    memory = far_memory(request, device)
    v = memory.as_strided((3, 16, 1, 16), (FAR, 16, 16, 1), 1024)
    v.copy_(_random((3, 16, 1, 16), BF16, device))
    out = memory.as_strided((3, 1, 16, 16), (FAR, 256, 16, 1), 2048)
    convert_layout(v, layout="transposed_v", out=out)
    assert torch.equal(_bits(out), _bits(v.permute(0, 2, 3, 1)))


@pytest.mark.no_kernels
@pytest.mark.parametrize("D", [2, 24, 64, 128, 256])
@pytest.mark.parametrize("page_size", [1, 5, 16, 64, 256])
@pytest.mark.parametrize("itemsize", [1, 2, 4])
def test_default_config_is_launchable(page_size, D, itemsize):
    config = default_config(page_size, D, itemsize)
    for size in (config.BLOCK_S, config.BLOCK_D, config.num_warps):
        assert size & (size - 1) == 0 and 1 <= size <= 64


V = torch.zeros(2, 4, 1, 8)
BAD_INPUT = {
    "layout": (dict(layout="hnd"), ValueError, "layout must be one of nhd, transposed_v"),
    "dtype": (dict(v_cache=V.long()), TypeError, "v_cache must be torch.float32"),
    "rank": (dict(v_cache=V[0]), ValueError, r"v_cache must have shape \(num_pages, page_size"),
    "no-slot": (dict(v_cache=V[:, :0]), ValueError, "v_cache must have a slot per page"),
    "out-shape": (dict(out=V), ValueError, r"out must have shape \(2, 1, 8, 4\), got"),
    "out-dtype": (dict(out=torch.zeros(2, 1, 8, 4).half()), TypeError, "out must be torch.float"),
    "out-overlaps": (
        dict(out=torch.zeros(1, 8, 4).expand(2, 1, 8, 4)), ValueError, "out must not overlap",
    ),
    "pages-alone": (
        dict(pages=torch.zeros(1, dtype=torch.int32)), ValueError, "out must be given with pages",
    ),
    "pages-dtype": (
        dict(out=torch.zeros(2, 1, 8, 4), pages=torch.zeros(1).long()), TypeError,
        "pages must be torch.int32",
    ),
    "device": (
        dict(out=torch.zeros(2, 1, 8, 4, device="meta")), ValueError, "must be on one device",
    ),
}  # fmt: skip


@pytest.mark.no_kernels
@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_refused_before_launch(name):
    changes, error, match = BAD_INPUT[name]
    with pytest.raises(error, match="^convert_layout: .*" + match):
        convert_layout(**dict(v_cache=V, layout="transposed_v") | changes)
