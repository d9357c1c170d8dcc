r"""What measuring one layer call costs, in flops and bytes, from its sizes.

Letters: W weights of the layer, T positions per example, d and p the features (channels) that one position reads and
makes, k probes; per example:

    T = 1, norms, embeddings     one read of input and output gradient
    exact, T > 1                 the same, 2 W T flop, W elements written and read (8 W bytes); or, where the rule takes
                                 a product of positions, its flops and elements
    fused                        8 W bytes (a first convolution also its patches) and no flop: the product is the one
                                 that training forms anyway, but in pieces, and so slower (`IN_PIECES`)
    k probes                     2 T k (d + p) flop; the output gradient is read twice, the weight gradient once a step
    inner products               2 W T flop and one read
    coordinates                  T = 1: 2 W flop; T > 1: 8 W bytes, and 2 W T flop where the layer is not fused
    a layer done over            6 W T flop

A thin convolution costs as much as one with `DeviceRates.filters` outputs, since kernels pad the channels.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DeviceRates:
    """Planning constants of a device type.

    Args:
        flops: Floating-point operations a second that layers reach.
        bytes: Bytes a second of memory traffic.
        call: Seconds to run one small operation, launch and Python included.
        filters: Output channels up to which a convolution costs as if it had so many.
    """

    flops: float
    bytes: float
    call: float
    filters: int


RATES = {"cpu": DeviceRates(1.9e11, 1.5e10, 8e-6, 16), "cuda": DeviceRates(3e13, 1.5e12, 8e-6, 8)}
"""By device type. Those of a CPU are fitted to two cores of an AMD EPYC, so that measuring rather costs less than it is
counted for: see the table in docs/results.md of what it comes to over a run. Filters on a CPU: convolutions with 4
outputs took 0.6, 0.45, 0.41 and 0.09 of the time of those with 32, 32, 64 and 128 (one thread, AVX-512). On an
accelerator from memory, unverified (low)."""

IN_PIECES = 0.8
"""What a weight gradient formed example by example, with norms, sum and all that goes with them, takes longer than one
formed at once, as a share of it: what measuring the residual network and the language model came to."""


@dataclass(frozen=True, slots=True)
class LayerSize:
    """What the cost model knows of one layer call.

    Args:
        weights: W, its trainable weights.
        positions: T, positions per example.
        activations: Elements of input and output per example.
        reruns: Forwards and backwards of the layer that measuring it adds.
        products: Multiplications that the exact norms of an example take; None for W T.
        formed: Elements that these form; None for W.
        fused: Whether its weight gradient may be formed example by example.
        probe: Multiplications of one probe at one position, d + p; 0 where there is no sketch.
        thin: Those of them that a thin convolution makes.
    """

    weights: int
    positions: int
    activations: int
    reruns: int = 0
    products: int | None = None
    formed: int | None = None
    fused: bool = False
    probe: int = 0
    thin: int = 0


@dataclass(frozen=True, slots=True)
class NormsBy:
    """How norms are come by where a layer leaves a choice.

    Args:
        fuse: Whether weight gradients may be formed example by example.
        probes: k, sketches of a layer; 0 for exact norms.
        inner_products: Whether <g_i, g> is wanted.
        coordinates: Whether the coordinate ratio is wanted.
    """

    fuse: bool = False
    probes: int = 0
    inner_products: bool = False
    coordinates: bool = False

    def fuses(self, layer: LayerSize) -> bool:
        """Return whether the weight gradient of a layer is formed example by example: there are several positions."""
        return self.fuse and layer.fused and layer.positions > 1

    def sketches(self, layer: LayerSize) -> bool:
        """Return whether a layer is sketched: where that is fewer flops than its exact norms."""
        thin = self.probes * layer.probe * layer.positions
        return layer.positions > 1 and 0 < thin < exact_products(layer)


@dataclass(frozen=True, slots=True)
class Cost:
    """What a number of examples cost in one layer.

    Args:
        flops: Floating-point operations.
        bytes: Memory traffic.
        slower: What products that are formed in pieces lose, in the time of so many floating-point operations.
    """

    flops: float
    bytes: float
    slower: float = 0.0

    def seconds(self, rates: DeviceRates) -> float:
        """Return modelled seconds, without calls."""
        return (self.flops + self.slower) / rates.flops + self.bytes / rates.bytes


def exact_products(layer: LayerSize) -> int:
    """Return the multiplications that the exact norms of an example take, where there are several positions."""
    return layer.weights * layer.positions if layer.products is None else layer.products


def layer_cost(layer: LayerSize, examples: int, how: NormsBy, rates: DeviceRates) -> Cost:
    """Return what measuring one call adds to a step, but for the time of calls.

    Args:
        layer: Its sizes.
        examples: n, measured examples.
        how: How norms are come by, and what else is wanted.
        rates: Of the device.

    Returns:
        Flops and bytes of all n examples.
    """
    product, read = 2 * layer.weights * layer.positions, 4 * layer.activations
    several, formed_anyway = layer.positions > 1, how.fuses(layer)
    flops = product * (how.inner_products + (how.coordinates and not formed_anyway) + 3 * layer.reruns)
    traffic = read * how.inner_products + 8 * layer.weights * (how.coordinates and several)
    if formed_anyway:
        traffic += 8 * (layer.weights if layer.formed is None or layer.products is not None else layer.formed)
    elif how.sketches(layer):
        made = how.probes * (layer.probe - layer.thin) + max(how.probes, rates.filters) * layer.thin
        flops += 2 * layer.positions * made
        traffic += 3 * read // 2
    else:
        traffic += read
        if several:
            flops += 2 * exact_products(layer)
            traffic += 8 * (layer.weights if layer.formed is None else layer.formed)
    once = 4 * layer.weights * (1 + how.sketches(layer))  # of the gradient: |G|^2, and G w
    return Cost(flops * examples, traffic * examples + once, IN_PIECES * product * formed_anyway * examples)
