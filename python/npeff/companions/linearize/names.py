"""Names of torch's operations by the part they play in an affine map."""

from __future__ import annotations


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


LINEAR = _names(
    """
    view _unsafe_view reshape _reshape_alias permute transpose t expand slice select unsqueeze squeeze alias detach
    clone
    _to_copy lift_fresh contiguous split split_with_sizes unsafe_split unsafe_chunk unbind diagonal diag_embed tril triu
    unfold roll flip repeat index index_select _unsafe_index gather take neg positive
    sum mean cumsum trace nansum
    avg_pool1d avg_pool2d avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_avg_pool1d
    upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d
    _upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d
    _upsample_bilinear2d_aa _upsample_bicubic2d_aa grid_sampler_2d grid_sampler_3d
    reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d
    constant_pad_nd pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle im2col col2im
    max_unpool2d max_unpool3d
    """
)
"""Linear in the first argument (``constant_pad_nd``: affine); the others may not depend on the input."""

JOINT = _names(
    """
    add sub rsub cat stack where masked_fill index_put index_fill index_add index_copy scatter scatter_add
    masked_scatter slice_scatter select_scatter diagonal_scatter
    """
)
"""Affine in all tensors together."""

FACTORS = {
    "mul": (0, 1),
    "mm": (0, 1),
    "bmm": (0, 1),
    "mv": (0, 1),
    "dot": (0, 1),
    "addmm": (1, 2),
    "addmv": (1, 2),
    "addbmm": (1, 2),
    "baddbmm": (1, 2),
    "addr": (1, 2),
    "addcmul": (1, 2),
    "convolution": (0, 1),
}
"""Linear in each of these arguments, affine in the rest."""

OFFSET = frozenset({"constant_pad_nd", "addmm", "addmv", "addbmm", "baddbmm", "addr", "addcmul", "convolution"}) | JOINT
"""May be non-zero at zero."""

GATED = _names("gelu silu mish hardswish tanh elu celu erf atan asinh sin tan expm1 log1p sinh")
"""Smooth functions of one number that are 0 at 0: written f(v) = v·g(v), and the gate g is held."""

HELD = _names(
    """
    sigmoid softplus exp exp2 log log2 log10 sqrt rsqrt reciprocal pow square cos cosh acos asin acosh atanh atan2 erfc
    erfinv lgamma digamma logit log_sigmoid_forward norm linalg_vector_norm logsumexp logcumsumexp std var var_mean
    std_mean prod cumprod fmod remainder hypot cdist _cdist_forward _pdist_forward
    """
)
"""Smooth functions that are held at their value."""

SOFTMAX = frozenset({"_softmax", "_safe_softmax"})

CONSTANT = _names(
    """
    zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty new_empty_strided
    sign sgn round floor ceil trunc heaviside floor_divide
    """
)
"""Constant between jumps, or constant altogether."""

RESHAPED = frozenset(
    {"as_strided", "as_strided_", "transpose_", "t_", "squeeze_", "unsqueeze_", "swapaxes_", "swapdims_", "detach_"}
)
"""Give the same memory another shape."""

SAME_ORDER = _names("view _unsafe_view reshape _reshape_alias")
"""Give the same numbers, in the same order, another shape."""

BY_POSITION = _names(
    """
    relu leaky_relu _prelu_kernel prelu rrelu_with_noise threshold hardtanh clamp clamp_min clamp_max hardsigmoid
    softshrink hardshrink abs nan_to_num add sub rsub mul div neg positive clone detach alias contiguous
    native_batch_norm cudnn_batch_norm miopen_batch_norm _native_batch_norm_legit_no_training _batch_norm_no_update
    """
)
"""Each number of the result depends on those at its place, and on constants."""

POOLING = _names(
    """
    avg_pool2d _adaptive_avg_pool2d max_pool2d_with_indices adaptive_max_pool2d avg_pool3d _adaptive_avg_pool3d
    max_pool3d_with_indices adaptive_max_pool3d
    """
)
"""Within windows of the last dimensions."""
