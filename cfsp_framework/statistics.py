"""Statistics of the built-in collectors; ``h (T, F)`` is the input of the down projection, over all tokens.

The heavy ones and the mean are also collected for held-out windows, ``DOWN_INPUT_GRAM.held_out()``, and products with
each token over the squared norm of its residual stream, ``DOWN_INPUT_GRAM.relative()``.
"""

from __future__ import annotations

from typing import Final

from cfsp_framework.api.data import Statistic

DOWN_INPUT_SQUARES: Final = Statistic("down_input_squares", summary="sum of h² over tokens", unseen=1.0)
DOWN_INPUT_MEAN: Final = Statistic("down_input_mean", summary="mean of h over tokens")
DOWN_INPUT_VARIANCE: Final = Statistic(
    "down_input_variance", summary="variance of h over tokens, divisor n", unseen=1.0
)
DOWN_INPUT_FLUCTUATION: Final = Statistic(
    "down_input_fluctuation", summary="FLAP's released running fluctuation of h, window by window", unseen=1.0
)

DOWN_INPUT_GRAM: Final = Statistic("down_input_gram", "(F, F)", "sum of h hᵀ over tokens", heavy=True, unseen=1.0)
DOWN_INPUT_GRAM_RELATIVE: Final = DOWN_INPUT_GRAM.relative()
DOWN_CROSS: Final = Statistic("down_cross", "(D, F)", "sum of target times hᵀ over tokens", heavy=True)
DOWN_TARGET_SQUARES: Final = Statistic("down_target_squares", "()", "sum of squares of the target")
DOWN_CROSS_RELATIVE: Final = DOWN_CROSS.relative()
DOWN_TARGET_SQUARES_RELATIVE: Final = DOWN_TARGET_SQUARES.relative()
FEED_FORWARD_INPUTS: Final = Statistic(
    "feed_forward_inputs", "(n, D)", "inputs of the feed-forward, token by token", heavy=True
)
FEED_FORWARD_TARGETS: Final = Statistic(
    "feed_forward_targets", "(n, D)", "target outputs of the feed-forward, token by token", heavy=True
)
TOKEN_WEIGHTS: Final = Statistic(
    "token_weights", "(n,)", "1 / the squared norm of each token's residual stream after the block", heavy=True
)

BLOCK_OUTPUT_SQUARES: Final = Statistic("block_output_squares", "()", "sum of squares of the block's output")
DOWN_INPUT_TAYLOR: Final = Statistic("down_input_taylor", summary="sum of |h dLoss/dh| over tokens")
DOWN_INPUT_TAYLOR_SQUARED: Final = Statistic("down_input_taylor_squared", summary="sum of (h dLoss/dh)² over tokens")

ANGULAR_DISTANCE: Final = Statistic("angular_distance", "()", "mean angle between block input and output, over π")
COSINE_DISTANCE: Final = Statistic("cosine_distance", "()", "mean of 1 - cosine of block input and output")
MSE_DISTANCE: Final = Statistic("mse_distance", "()", "mean squared difference of block input and output")
MAE_DISTANCE: Final = Statistic("mae_distance", "()", "mean absolute difference of block input and output")
