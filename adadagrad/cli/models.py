"""The models that the command line knows, built for the shape of the data."""

from __future__ import annotations

from torch import nn

from adadagrad.core.errors import InvalidArgument


def logistic(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Build multinomial logistic regression: one linear layer.

    Args:
        input_shape: Shape of one input; it is flattened.
        num_classes: How many classes.

    Returns:
        The module, from (n, *input_shape) to logits (n, num_classes).
    """
    return nn.Sequential(nn.Flatten(), nn.Linear(_size(input_shape), num_classes))


def mlp(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Build a perceptron with one hidden layer of 64 ReLU units.

    Args:
        input_shape: Shape of one input; it is flattened.
        num_classes: How many classes.

    Returns:
        The module, from (n, *input_shape) to logits (n, num_classes).
    """
    return nn.Sequential(nn.Flatten(), nn.Linear(_size(input_shape), 64), nn.ReLU(), nn.Linear(64, num_classes))


def cnn(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Build the paper's convolutional network: two of (convolution, ReLU, pooling), then one linear layer.

    On 28x28 images: convolutions of 5x5 with 16 and 32 channels, and 1568 inputs to the linear layer, as in
    timlautk/AdAdaGrad. Images below 16x16 get 3x3 convolutions with 8 and 16 channels, which is ours.

    Args:
        input_shape: Channels, height, width; at least 4x4.
        num_classes: How many classes.

    Returns:
        The module, from (n, *input_shape) to logits (n, num_classes).

    Raises:
        InvalidArgument: The inputs are not images.
    """
    if len(input_shape) != 3 or min(input_shape[1:]) < 4:
        raise InvalidArgument(
            f"--model cnn needs images (channels, height, width) of at least 4x4, got inputs of shape {input_shape}: "
            "choose mlp, or give your own package.module:function"
        )
    channels, height, width = input_shape
    first, second, kernel = (16, 32, 5) if min(height, width) >= 16 else (8, 16, 3)
    return nn.Sequential(
        nn.Conv2d(channels, first, kernel, padding=kernel // 2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(first, second, kernel, padding=kernel // 2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(second * (height // 4) * (width // 4), num_classes),
    )


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for extent in shape:
        size *= extent
    return size
