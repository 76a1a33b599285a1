"""The Triton kernels of ``fused.py``. Importing this file needs Triton.

Shape letters: B batch, W windows, N tokens of a window, A heads, d channels of a head, O offsets in a window. In memory:
qkv (B*W, N, 3, A, d), out (B*W, N, A, d), log_sum (B*W, A, N), table (A, O), regions (W, N).

A program works on one head and walks over some windows. Programs of neighbouring heads run side by side, since a token's
heads lie next to each other in memory. The logits of the pair (i, j) of tokens are

    scale * <q_i, k_j> + table[code_i - code_j + (O - 1) / 2]

and ``FAR`` for tokens of different regions and for keys past the end of the window. Two families of kernels:

* "whole": the window fits in one tile. The tile of biases is read once and serves all windows of a program; in the
  backward pass so does the tile that sums up its gradient.
* "blocks": larger windows go through tiles of queries × keys; the softmax is accumulated over blocks of keys (arXiv
  2205.14135). The backward pass has one kernel per thing that a program can keep in registers: the gradient of a block of
  queries, of a block of keys and values, of a tile of biases.

No kernel uses atomic operations: results do not differ from run to run.
"""

from __future__ import annotations

import triton
import triton.language as tl

FAR = tl.constexpr(-1e30)
"""The logit of a pair that does not attend. Finite, so that a row may begin with a block of keys that are all far: what it
adds up there is multiplied by exp(FAR - x) = 0 once the row meets itself."""

EPS_SQUARED = tl.constexpr(1e-6)
"""Square of the smallest norm that cosine attention divides by: ``COSINE_EPS`` of the reference."""


@triton.jit
def load_rows(
    start: tl.tensor, rows: tl.tensor, stride: tl.tensor, tokens: tl.tensor, D: tl.constexpr, D_TILE: tl.constexpr
) -> tl.tensor:
    """(rows, D_TILE) the vectors of some tokens, ``stride`` elements apart; 0 past the last token and channel."""
    channels = tl.arange(0, D_TILE)
    inside = rows[:, None] < tokens
    if D < D_TILE:
        inside = inside & (channels[None, :] < D)
    return tl.load(start + rows[:, None] * stride + channels[None, :], mask=inside, other=0.0)


@triton.jit
def store_rows(
    start: tl.tensor,
    rows: tl.tensor,
    stride: tl.tensor,
    tokens: tl.tensor,
    values: tl.tensor,
    D: tl.constexpr,
    D_TILE: tl.constexpr,
) -> None:
    """The reverse of ``load_rows``."""
    channels = tl.arange(0, D_TILE)
    inside = rows[:, None] < tokens
    if D < D_TILE:
        inside = inside & (channels[None, :] < D)
    tl.store(start + rows[:, None] * stride + channels[None, :], values.to(start.dtype.element_ty), mask=inside)


@triton.jit
def to_unit(vectors: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """The vectors (rows, d) at unit length in single precision, and the squares of their lengths."""
    vectors = vectors.to(tl.float32)
    square = tl.sum(vectors * vectors, 1)
    return vectors * tl.rsqrt(tl.maximum(square, EPS_SQUARED))[:, None], square


@triton.jit
def through_unit(grad: tl.tensor, unit: tl.tensor, square: tl.tensor) -> tl.tensor:
    """The gradient of vectors from that of their unit vectors: the part along the vector is lost, unless it was too short."""
    along = tl.where(square >= EPS_SQUARED, tl.sum(grad * unit, 1), 0.0)
    return (grad - unit * along[:, None]) * tl.rsqrt(tl.maximum(square, EPS_SQUARED))[:, None]


@triton.jit
def load_code(code: tl.tensor, rows: tl.tensor, tokens: tl.tensor) -> tl.tensor:
    """(rows,) the codes of some tokens; past the end that of the last token, so that every difference is an offset."""
    return tl.load(code + tl.minimum(rows, tokens - 1)).to(tl.int32)


@triton.jit
def load_bias(
    table: tl.tensor, codes: tl.tensor, key_codes: tl.tensor, keys: tl.tensor, tokens: tl.tensor, offsets: tl.tensor
) -> tl.tensor:
    """(queries, keys) biases of one head; ``FAR`` for keys past the end. All of shapes that broadcast to that."""
    index = codes - key_codes + (offsets - 1) // 2
    return tl.load(table + index, mask=keys < tokens, other=FAR).to(tl.float32)


@triton.jit(do_not_specialize=["windows", "per_image"])
def forward_whole(
    qkv: tl.tensor,
    table: tl.tensor,
    code: tl.tensor,
    regions: tl.tensor,
    scale: tl.tensor,
    out: tl.tensor,
    log_sum: tl.tensor,
    windows: tl.tensor,
    per_image: tl.tensor,
    tokens: tl.tensor,
    heads: tl.tensor,
    offsets: tl.tensor,
    D: tl.constexpr,
    D_TILE: tl.constexpr,
    TILE: tl.constexpr,
    COSINE: tl.constexpr,
) -> None:
    """Grid: heads * programs per head."""
    head = tl.program_id(0) % heads
    first = tl.program_id(0) // heads
    step = tl.num_programs(0) // heads
    rows = tl.arange(0, TILE)
    codes = load_code(code, rows, tokens)
    bias = load_bias(table + head * offsets, codes[:, None], codes[None, :], rows[None, :], tokens, offsets)
    factor = tl.load(scale + head).to(tl.float32)
    width = heads * D
    dtype = qkv.dtype.element_ty
    for i in range(0, tl.cdiv(windows - first, step)):
        window = (first + i * step).to(tl.int64)
        start = qkv + window * tokens * 3 * width + head * D
        q = load_rows(start, rows, 3 * width, tokens, D, D_TILE)
        k = load_rows(start + width, rows, 3 * width, tokens, D, D_TILE)
        v = load_rows(start + 2 * width, rows, 3 * width, tokens, D, D_TILE)
        if COSINE:
            q = to_unit(q)[0].to(dtype)
            k = to_unit(k)[0].to(dtype)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * factor + bias
        if regions is not None:
            region = tl.load(regions + window % per_image * tokens + rows, mask=rows < tokens, other=0)
            logits = tl.where(region[:, None] == region[None, :], logits, FAR)
        largest = tl.max(logits, 1)
        weights = tl.exp(logits - largest[:, None])
        total = tl.sum(weights, 1)
        mean = tl.dot(weights.to(dtype), v, input_precision="ieee") / total[:, None]
        store_rows(out + window * tokens * width + head * D, rows, width, tokens, mean, D, D_TILE)
        tl.store(log_sum + (window * heads + head) * tokens + rows, largest + tl.log(total), mask=rows < tokens)


@triton.jit(do_not_specialize=["windows", "per_image"])
def backward_whole(
    qkv: tl.tensor,
    table: tl.tensor,
    code: tl.tensor,
    regions: tl.tensor,
    scale: tl.tensor,
    log_sum: tl.tensor,
    grad: tl.tensor,
    qkv_grad: tl.tensor,
    bias_grad: tl.tensor,
    scale_grad: tl.tensor,
    windows: tl.tensor,
    per_image: tl.tensor,
    tokens: tl.tensor,
    heads: tl.tensor,
    offsets: tl.tensor,
    D: tl.constexpr,
    D_TILE: tl.constexpr,
    TILE: tl.constexpr,
    COSINE: tl.constexpr,
) -> None:
    """Grid: heads * programs per head. bias_grad (programs per head, A, N, N) or None, scale_grad (…, A) or None."""
    head = tl.program_id(0) % heads
    first = tl.program_id(0) // heads
    step = tl.num_programs(0) // heads
    rows = tl.arange(0, TILE)
    codes = load_code(code, rows, tokens)
    bias = load_bias(table + head * offsets, codes[:, None], codes[None, :], rows[None, :], tokens, offsets)
    factor = tl.load(scale + head).to(tl.float32)
    width = heads * D
    dtype = qkv.dtype.element_ty
    bias_sum = tl.zeros((TILE, TILE), tl.float32)
    scale_sum = tl.zeros((TILE,), tl.float32)
    for i in range(0, tl.cdiv(windows - first, step)):
        window = (first + i * step).to(tl.int64)
        start = qkv + window * tokens * 3 * width + head * D
        q = load_rows(start, rows, 3 * width, tokens, D, D_TILE)
        k = load_rows(start + width, rows, 3 * width, tokens, D, D_TILE)
        v = load_rows(start + 2 * width, rows, 3 * width, tokens, D, D_TILE)
        g = load_rows(grad + window * tokens * width + head * D, rows, width, tokens, D, D_TILE)
        # Rows past the end get the weight exp(-inf) = 0.
        norm = tl.load(log_sum + (window * heads + head) * tokens + rows, mask=rows < tokens, other=float("inf"))
        if COSINE:
            q_unit, q_square = to_unit(q)
            k_unit, k_square = to_unit(k)
            q, k = q_unit.to(dtype), k_unit.to(dtype)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * factor + bias
        if regions is not None:
            region = tl.load(regions + window % per_image * tokens + rows, mask=rows < tokens, other=0)
            logits = tl.where(region[:, None] == region[None, :], logits, FAR)
        weights = tl.exp(logits - norm[:, None])
        v_grad = tl.dot(tl.trans(weights.to(dtype)), g, input_precision="ieee")
        start_grad = qkv_grad + window * tokens * 3 * width + head * D
        store_rows(start_grad + 2 * width, rows, 3 * width, tokens, v_grad, D, D_TILE)
        weights_grad = tl.dot(g, tl.trans(v), input_precision="ieee")
        logits_grad = weights * (weights_grad - tl.sum(weights * weights_grad, 1)[:, None])
        if bias_grad is not None:
            bias_sum += logits_grad
        rounded = logits_grad.to(dtype)
        q_grad = tl.dot(rounded, k, input_precision="ieee")
        k_grad = tl.dot(tl.trans(rounded), q, input_precision="ieee") * factor
        if scale_grad is not None:  # sum of logits_grad * cosine
            scale_sum += tl.sum(q_grad * q.to(tl.float32), 1)
        q_grad = q_grad * factor
        if COSINE:
            q_grad = through_unit(q_grad, q_unit, q_square)
            k_grad = through_unit(k_grad, k_unit, k_square)
        store_rows(start_grad, rows, 3 * width, tokens, q_grad, D, D_TILE)
        store_rows(start_grad + width, rows, 3 * width, tokens, k_grad, D, D_TILE)
    if bias_grad is not None:
        place = bias_grad + (first * heads + head).to(tl.int64) * tokens * tokens
        inside = (rows[:, None] < tokens) & (rows[None, :] < tokens)
        tl.store(place + rows[:, None] * tokens + rows[None, :], bias_sum, mask=inside)
    if scale_grad is not None:
        tl.store(scale_grad + first * heads + head, tl.sum(scale_sum, 0))


@triton.jit(do_not_specialize=["per_image"])
def forward_blocks(
    qkv: tl.tensor,
    table: tl.tensor,
    code: tl.tensor,
    regions: tl.tensor,
    scale: tl.tensor,
    out: tl.tensor,
    log_sum: tl.tensor,
    per_image: tl.tensor,
    tokens: tl.tensor,
    heads: tl.tensor,
    offsets: tl.tensor,
    D: tl.constexpr,
    D_TILE: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    COSINE: tl.constexpr,
) -> None:
    """Grid: windows * blocks of queries * heads."""
    head = tl.program_id(0) % heads
    blocks = tl.cdiv(tokens, QUERIES)
    rows = tl.program_id(0) // heads % blocks * QUERIES + tl.arange(0, QUERIES)
    window = (tl.program_id(0) // heads // blocks).to(tl.int64)
    codes = load_code(code, rows, tokens)
    factor = tl.load(scale + head).to(tl.float32)
    table += head * offsets
    width = heads * D
    dtype = qkv.dtype.element_ty
    start = qkv + window * tokens * 3 * width + head * D
    q = load_rows(start, rows, 3 * width, tokens, D, D_TILE)
    if COSINE:
        q = to_unit(q)[0].to(dtype)
    if regions is not None:
        regions += window % per_image * tokens
        region = tl.load(regions + rows, mask=rows < tokens, other=0)
    largest = tl.full((QUERIES,), -float("inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    mean = tl.zeros((QUERIES, D_TILE), tl.float32)
    for first in range(0, tokens, KEYS):
        keys = first + tl.arange(0, KEYS)
        k = load_rows(start + width, keys, 3 * width, tokens, D, D_TILE)
        v = load_rows(start + 2 * width, keys, 3 * width, tokens, D, D_TILE)
        if COSINE:
            k = to_unit(k)[0].to(dtype)
        key_codes = load_code(code, keys, tokens)
        bias = load_bias(table, codes[:, None], key_codes[None, :], keys[None, :], tokens, offsets)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * factor + bias
        if regions is not None:
            key_region = tl.load(regions + keys, mask=keys < tokens, other=0)
            logits = tl.where(region[:, None] == key_region[None, :], logits, FAR)
        larger = tl.maximum(largest, tl.max(logits, 1))
        weights = tl.exp(logits - larger[:, None])
        shrink = tl.exp(largest - larger)
        total = total * shrink + tl.sum(weights, 1)
        mean = tl.dot(weights.to(dtype), v, mean * shrink[:, None], input_precision="ieee")
        largest = larger
    mean = mean / total[:, None]
    store_rows(out + window * tokens * width + head * D, rows, width, tokens, mean, D, D_TILE)
    tl.store(log_sum + (window * heads + head) * tokens + rows, largest + tl.log(total), mask=rows < tokens)


@triton.jit(do_not_specialize=["per_image"])
def backward_queries(
    qkv: tl.tensor,
    table: tl.tensor,
    code: tl.tensor,
    regions: tl.tensor,
    scale: tl.tensor,
    out: tl.tensor,
    log_sum: tl.tensor,
    grad: tl.tensor,
    inner: tl.tensor,
    qkv_grad: tl.tensor,
    scale_grad: tl.tensor,
    per_image: tl.tensor,
    tokens: tl.tensor,
    heads: tl.tensor,
    offsets: tl.tensor,
    D: tl.constexpr,
    D_TILE: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    COSINE: tl.constexpr,
) -> None:
    """Grid: windows * blocks of queries * heads. Also writes ``inner`` (B*W, A, N), the products <out_i, grad_i>, which the
    other kernels need, and scale_grad (B*W, blocks, A) unless it is None."""
    head = tl.program_id(0) % heads
    blocks = tl.cdiv(tokens, QUERIES)
    rows = tl.program_id(0) // heads % blocks * QUERIES + tl.arange(0, QUERIES)
    window = (tl.program_id(0) // heads // blocks).to(tl.int64)
    codes = load_code(code, rows, tokens)
    factor = tl.load(scale + head).to(tl.float32)
    table += head * offsets
    width = heads * D
    dtype = qkv.dtype.element_ty
    start = qkv + window * tokens * 3 * width + head * D
    here = window * tokens * width + head * D
    q = load_rows(start, rows, 3 * width, tokens, D, D_TILE)
    g = load_rows(grad + here, rows, width, tokens, D, D_TILE)
    o = load_rows(out + here, rows, width, tokens, D, D_TILE)
    product = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
    row_place = (window * heads + head) * tokens + rows
    tl.store(inner + row_place, product, mask=rows < tokens)
    norm = tl.load(log_sum + row_place, mask=rows < tokens, other=float("inf"))
    if COSINE:
        q_unit, q_square = to_unit(q)
        q = q_unit.to(dtype)
    if regions is not None:
        regions += window % per_image * tokens
        region = tl.load(regions + rows, mask=rows < tokens, other=0)
    q_grad = tl.zeros((QUERIES, D_TILE), tl.float32)
    for first in range(0, tokens, KEYS):
        keys = first + tl.arange(0, KEYS)
        k = load_rows(start + width, keys, 3 * width, tokens, D, D_TILE)
        v = load_rows(start + 2 * width, keys, 3 * width, tokens, D, D_TILE)
        if COSINE:
            k = to_unit(k)[0].to(dtype)
        key_codes = load_code(code, keys, tokens)
        bias = load_bias(table, codes[:, None], key_codes[None, :], keys[None, :], tokens, offsets)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * factor + bias
        if regions is not None:
            key_region = tl.load(regions + keys, mask=keys < tokens, other=0)
            logits = tl.where(region[:, None] == key_region[None, :], logits, FAR)
        weights = tl.exp(logits - norm[:, None])
        weights_grad = tl.dot(g, tl.trans(v), input_precision="ieee")
        logits_grad = weights * (weights_grad - product[:, None])
        q_grad = tl.dot(logits_grad.to(dtype), k, q_grad, input_precision="ieee")
    if scale_grad is not None:  # sum of logits_grad * cosine
        tl.store(scale_grad + tl.program_id(0), tl.sum(tl.sum(q_grad * q.to(tl.float32), 1), 0))
    q_grad = q_grad * factor
    if COSINE:
        q_grad = through_unit(q_grad, q_unit, q_square)
    store_rows(qkv_grad + window * tokens * 3 * width + head * D, rows, 3 * width, tokens, q_grad, D, D_TILE)


@triton.jit(do_not_specialize=["per_image"])
def backward_keys(
    qkv: tl.tensor,
    table: tl.tensor,
    code: tl.tensor,
    regions: tl.tensor,
    scale: tl.tensor,
    log_sum: tl.tensor,
    grad: tl.tensor,
    inner: tl.tensor,
    qkv_grad: tl.tensor,
    per_image: tl.tensor,
    tokens: tl.tensor,
    heads: tl.tensor,
    offsets: tl.tensor,
    D: tl.constexpr,
    D_TILE: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    COSINE: tl.constexpr,
) -> None:
    """Grid: windows * blocks of keys * heads. Tiles are keys × queries here, so that they enter products without transposing."""
    head = tl.program_id(0) % heads
    blocks = tl.cdiv(tokens, KEYS)
    keys = tl.program_id(0) // heads % blocks * KEYS + tl.arange(0, KEYS)
    window = (tl.program_id(0) // heads // blocks).to(tl.int64)
    key_codes = load_code(code, keys, tokens)
    factor = tl.load(scale + head).to(tl.float32)
    table += head * offsets
    width = heads * D
    dtype = qkv.dtype.element_ty
    start = qkv + window * tokens * 3 * width + head * D
    grad += window * tokens * width + head * D
    log_sum += (window * heads + head) * tokens
    inner += (window * heads + head) * tokens
    k = load_rows(start + width, keys, 3 * width, tokens, D, D_TILE)
    v = load_rows(start + 2 * width, keys, 3 * width, tokens, D, D_TILE)
    if COSINE:
        k_unit, k_square = to_unit(k)
        k = k_unit.to(dtype)
    if regions is not None:
        regions += window % per_image * tokens
        key_region = tl.load(regions + keys, mask=keys < tokens, other=0)
    k_grad = tl.zeros((KEYS, D_TILE), tl.float32)
    v_grad = tl.zeros((KEYS, D_TILE), tl.float32)
    for first in range(0, tokens, QUERIES):
        rows = first + tl.arange(0, QUERIES)
        q = load_rows(start, rows, 3 * width, tokens, D, D_TILE)
        g = load_rows(grad, rows, width, tokens, D, D_TILE)
        norm = tl.load(log_sum + rows, mask=rows < tokens, other=float("inf"))
        product = tl.load(inner + rows, mask=rows < tokens, other=0.0)
        if COSINE:
            q = to_unit(q)[0].to(dtype)
        codes = load_code(code, rows, tokens)
        bias = load_bias(table, codes[None, :], key_codes[:, None], keys[:, None], tokens, offsets)
        logits = tl.dot(k, tl.trans(q), input_precision="ieee") * factor + bias
        if regions is not None:
            region = tl.load(regions + rows, mask=rows < tokens, other=0)
            logits = tl.where(key_region[:, None] == region[None, :], logits, FAR)
        weights = tl.exp(logits - norm[None, :])
        v_grad = tl.dot(weights.to(dtype), g, v_grad, input_precision="ieee")
        weights_grad = tl.dot(v, tl.trans(g), input_precision="ieee")
        logits_grad = weights * (weights_grad - product[None, :])
        k_grad = tl.dot(logits_grad.to(dtype), q, k_grad, input_precision="ieee")
    k_grad = k_grad * factor
    if COSINE:
        k_grad = through_unit(k_grad, k_unit, k_square)
    start_grad = qkv_grad + window * tokens * 3 * width + head * D
    store_rows(start_grad + width, keys, 3 * width, tokens, k_grad, D, D_TILE)
    store_rows(start_grad + 2 * width, keys, 3 * width, tokens, v_grad, D, D_TILE)


@triton.jit(do_not_specialize=["windows", "per_image"])
def backward_bias(
    qkv: tl.tensor,
    table: tl.tensor,
    code: tl.tensor,
    regions: tl.tensor,
    scale: tl.tensor,
    log_sum: tl.tensor,
    grad: tl.tensor,
    inner: tl.tensor,
    bias_grad: tl.tensor,
    windows: tl.tensor,
    per_image: tl.tensor,
    tokens: tl.tensor,
    heads: tl.tensor,
    offsets: tl.tensor,
    first_head: tl.tensor,
    some_heads: tl.tensor,
    D: tl.constexpr,
    D_TILE: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    COSINE: tl.constexpr,
) -> None:
    """Grid: shares of the windows * tiles * some heads. bias_grad (shares, some heads, N, N)."""
    head_place = tl.program_id(0) % some_heads
    head = first_head + head_place
    key_blocks = tl.cdiv(tokens, KEYS)
    tiles = tl.cdiv(tokens, QUERIES) * key_blocks
    tile = tl.program_id(0) // some_heads % tiles
    first = tl.program_id(0) // some_heads // tiles
    step = tl.num_programs(0) // some_heads // tiles
    rows = tile // key_blocks * QUERIES + tl.arange(0, QUERIES)
    keys = tile % key_blocks * KEYS + tl.arange(0, KEYS)
    codes, key_codes = load_code(code, rows, tokens), load_code(code, keys, tokens)
    bias = load_bias(table + head * offsets, codes[:, None], key_codes[None, :], keys[None, :], tokens, offsets)
    factor = tl.load(scale + head).to(tl.float32)
    width = heads * D
    dtype = qkv.dtype.element_ty
    bias_sum = tl.zeros((QUERIES, KEYS), tl.float32)
    for i in range(0, tl.cdiv(windows - first, step)):
        window = (first + i * step).to(tl.int64)
        start = qkv + window * tokens * 3 * width + head * D
        q = load_rows(start, rows, 3 * width, tokens, D, D_TILE)
        k = load_rows(start + width, keys, 3 * width, tokens, D, D_TILE)
        v = load_rows(start + 2 * width, keys, 3 * width, tokens, D, D_TILE)
        g = load_rows(grad + window * tokens * width + head * D, rows, width, tokens, D, D_TILE)
        row_place = (window * heads + head) * tokens + rows
        norm = tl.load(log_sum + row_place, mask=rows < tokens, other=float("inf"))
        product = tl.load(inner + row_place, mask=rows < tokens, other=0.0)
        if COSINE:
            q = to_unit(q)[0].to(dtype)
            k = to_unit(k)[0].to(dtype)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * factor + bias
        if regions is not None:
            row_regions = regions + window % per_image * tokens
            region = tl.load(row_regions + rows, mask=rows < tokens, other=0)
            key_region = tl.load(row_regions + keys, mask=keys < tokens, other=0)
            logits = tl.where(region[:, None] == key_region[None, :], logits, FAR)
        weights = tl.exp(logits - norm[:, None])
        weights_grad = tl.dot(g, tl.trans(v), input_precision="ieee")
        bias_sum += weights * (weights_grad - product[:, None])
    place = bias_grad + (first * some_heads + head_place).to(tl.int64) * tokens * tokens
    inside = (rows[:, None] < tokens) & (keys[None, :] < tokens)
    tl.store(place + rows[:, None] * tokens + keys[None, :], bias_sum, mask=inside)


@triton.jit
def bias_to_table(
    bias_grad: tl.tensor,
    code: tl.tensor,
    token_at: tl.tensor,
    table_grad: tl.tensor,
    tokens: tl.tensor,
    offsets: tl.tensor,
    QUERIES: tl.constexpr,
    OFFSETS: tl.constexpr,
) -> None:
    """Sums gradients per pair of tokens, (A, N, N), to gradients per offset, (A, O).

    ``token_at`` (O,) is the inverse of ``code``: the token with code ``code[0] + c - (O - 1) / 2`` at place c, or -1. Grid:
    (blocks of offsets, heads).
    """
    head = tl.program_id(1)
    offset = tl.program_id(0) * OFFSETS + tl.arange(0, OFFSETS)
    bias_grad += head.to(tl.int64) * tokens * tokens
    start = tl.load(code).to(tl.int32)
    total = tl.zeros((OFFSETS,), tl.float32)
    for first in range(0, tokens, QUERIES):
        rows = first + tl.arange(0, QUERIES)
        # the code of the key that is ``offset`` away from each query, less that of token 0, centred
        place = (load_code(code, rows, tokens) - start)[:, None] - offset[None, :] + (offsets - 1)
        known = (rows[:, None] < tokens) & (place >= 0) & (place < offsets)
        key = tl.load(token_at + place, mask=known, other=-1)
        found = tl.load(bias_grad + rows[:, None] * tokens + key, mask=key >= 0, other=0.0)
        total += tl.sum(found, 0)
    tl.store(table_grad + head * offsets + offset, total, mask=offset < offsets)
