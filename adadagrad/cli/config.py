"""Everything that can be chosen for a run, as typed records.

One record is one group of ``--help`` and one table of ``config.toml``; the texts below are what ``--help`` shows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ProblemOptions:
    """What is trained, on what.

    Args:
        data: digits (embedded, 8x8 images), mnist:DIR (a folder with the four IDX files, plain or .gz), or
            package.module:function, called without arguments, returning (train_dataset, validation_dataset).
        model: logistic, mlp, cnn, or package.module:function, called without arguments, returning the module.
    """

    data: str = "digits"
    model: str = "mlp"


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """How many examples one optimizer step averages.

    Args:
        policy: recommended (the choice that docs/how-to-choose.md explains), norm (the paper's test), inner-product,
            augmented, coordinate, noise-scale, cabs, divebatch, big-batch, constant, staged, linear, geometric or
            recorded.
        global_batch_size: Examples in the first step; a constant batch keeps it, --stages and --plan say it
            themselves.
        min_batch_size: Smallest batch of a policy that may shrink it; without it the first one under the recommended
            policy, and under others the smallest that can be measured [recommended, noise-scale, cabs].
        max_batch_size: Largest batch; without it the whole training set.
        micro_batch_size: Most examples in one forward: what memory allows.
        max_growth: Largest factor from one batch size to the next; without it 1.2 under the recommended policy and
            noise-scale, whose first averages are of few steps, and no limit under others.
        multiple_of: Round batch sizes up to a multiple of this.
        on_infinite: What a request for infinitely many examples does: hold the size, or go to the cap.
        confidence: Move only where the measurement is this sure, for example 0.9; without it at once [recommended,
            norm, noise-scale, cabs, big-batch].
    """

    policy: str = "recommended"
    global_batch_size: int = 64
    min_batch_size: int | None = None
    max_batch_size: int | None = None
    micro_batch_size: int = 512
    max_growth: float | None = None
    multiple_of: int = 1
    on_infinite: Literal["hold", "cap"] = "hold"
    confidence: float | None = None


@dataclass(frozen=True, kw_only=True)
class PolicyOptions:
    """Parameters of the policies; the names in brackets say which policies use them. Another policy refuses the flag.

    Args:
        eta: Largest relative error of the gradient; smaller asks for larger batches [norm, coordinate, big-batch].
        theta: Largest relative error along the gradient [inner-product, augmented].
        nu: Largest relative error across the gradient [augmented].
        finite_population: Correction for a batch that is a good part of the data [all tests].
        reduction: How coordinates become one number; max is the paper's [coordinate].
        quantile: Which quantile of the coordinates, with --reduction quantile [coordinate].
        fraction: Share of the noise scale to hold the batch at; larger asks for larger batches [noise-scale].
        averaging: Weight of the past in the averages over measured steps [noise-scale, cabs].
        cabs_scale: Factor on the request; larger asks for larger batches [cabs].
        loss_offset: What the loss cannot fall below [cabs].
        delta: Share of the data set that pure noise asks for [divebatch].
        stages: Samples:size entries such as "0:256 1M:1024" [staged].
        plan: Directory or run.jsonl of a run whose batch sizes are repeated [recorded, needed].
        end_batch_size: Last size of the ramp [linear, needed; geometric].
        ramp_samples: Samples until the last size is reached [linear, needed].
        increment: Step from one size to the next [linear, big-batch].
        factor: Growth at each stage [geometric].
        every_samples: Samples in a stage [geometric, needed].
    """

    eta: float = 0.25
    theta: float = 0.9
    nu: float = 5.84
    finite_population: Literal["off", "current", "solved"] = "off"
    reduction: Literal["max", "quantile", "blocks", "weighted"] = "max"
    quantile: float = 0.9
    fraction: float = 1.0
    averaging: float = 0.95
    cabs_scale: float = 1.0
    loss_offset: float = 0.0
    delta: float = 0.1
    stages: str | None = None
    plan: str | None = None
    end_batch_size: int | None = None
    ramp_samples: int | None = None
    increment: int = 1
    factor: float = 2.0
    every_samples: int | None = None


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """How the parameters move.

    Args:
        optimizer: adagrad, adagrad-norm, sgd, adam, adamw, mars, mars-m, madam, lamadam, adarankgrad, sift,
            extrapolated-sgd, extrapolated-adam, adagrad-ota or adam-ota.
        lr: Learning rate, of the base batch where --rate changes it.
        rate: How the learning rate follows the batch size: none, recommended (linear with the recommended policy and
            noise-scale, none with others), adascale, adamscale, accumulator, linear, sqrt, legw or seesaw.
        base_batch_size: Batch size that --lr was chosen for; without it the first one [any rate but none and
            recommended].
        smoothing: Weight of the past in the rate's averages; without it that of the AdaScale paper [adascale,
            adamscale, accumulator].
        progress_in: What schedules and budget count: examples, or the gain's scale-invariant progress [adascale,
            adamscale, accumulator].
        legw_epochs: Epochs of warm-up at the base batch size [legw].
        momentum: Momentum [sgd, extrapolated-sgd].
        weight_decay: Weight decay.
        gamma: Scale of the gradient's correction [mars, mars-m].
        mars_variant: What the corrected momentum drives [mars].
        mars_mode: approximate, or exact: the batch is evaluated a second time, at the last weights [mars, mars-m].
        max_rank: Largest rank in which the moments of a matrix are kept [adarankgrad].
        sift_rate: Share of every tensor's entries that is trained [sift].
        extrapolation: Displacement of the weights relative to the learning rate [extrapolated-sgd, extrapolated-adam].
        perturb: What they are displaced by [extrapolated-sgd].
        power: alpha, in the place of AdaGrad's and Adam's square [adagrad-ota, adam-ota], above 1 and at most 2.
        lr_schedule: constant, cosine, linear or step, over samples.
        warmup_samples: Samples of linear warm-up [cosine, linear].
        lr_floor: Last learning rate as a fraction of the first [cosine, linear].
        lr_milestones: Samples:factor entries such as "20000:0.1 40000:0.01" [step].
        max_grad_norm: Clip the gradient to this norm; without it no clipping.
    """

    optimizer: str = "adagrad"
    lr: float = 0.01
    rate: str = "recommended"
    base_batch_size: int | None = None
    smoothing: float | None = None
    progress_in: Literal["samples", "scale_invariant"] = "scale_invariant"
    legw_epochs: float = 1.0
    momentum: float = 0.0
    weight_decay: float = 0.0
    gamma: float = 0.025
    mars_variant: Literal["adamw", "lion", "shampoo"] = "adamw"
    mars_mode: Literal["approximate", "exact"] = "approximate"
    max_rank: int = 16
    sift_rate: float = 0.008
    extrapolation: float = 1.0
    perturb: Literal["past_local", "past_global", "isotropic", "filter"] = "past_local"
    power: float = 1.5
    lr_schedule: str = "constant"
    warmup_samples: int = 0
    lr_floor: float = 0.0
    lr_milestones: str | None = None
    max_grad_norm: float | None = None


@dataclass(frozen=True, kw_only=True)
class MeasureOptions:
    """How the gradient's noise is measured.

    Args:
        measure_every: Steps from one measurement to the next; 1 is the paper, auto keeps to --max-overhead.
        max_overhead: Largest average share of a step's cost that measuring may take, with auto; without it 0.2 under
            the recommended policy and 0.05 under others.
        max_examples: Most examples measured in a step; all is the paper.
    """

    measure_every: int | Literal["auto"] = "auto"
    max_overhead: float | None = None
    max_examples: int | Literal["all"] = 128


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How long, how often, where.

    Args:
        epochs: Passes over the training set, where --samples is not given.
        samples: Budget in samples instead of epochs.
        seed: Of the initial weights and of the order of the data.
        evaluations: How many times to evaluate, evenly in samples.
        checkpoints: How many checkpoints to write, evenly in samples; the last one stays.
        on_nonfinite: What a gradient that is not finite does: skip the update, or stop the run.
        device: Where to train, for example cpu or cuda.
        threads: CPU threads; 0 takes 1 where the work is too small to share out (digits, logistic, mlp), and torch's
            choice otherwise.
    """

    epochs: int = 10
    samples: int | None = None
    seed: int = 0
    evaluations: int = 30
    checkpoints: int = 5
    on_nonfinite: Literal["skip", "stop"] = "skip"
    device: str = "cpu"
    threads: int = 0


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The resolved choice for one run; what ``config.toml`` holds."""

    problem: ProblemOptions = field(default_factory=ProblemOptions)
    batch: BatchOptions = field(default_factory=BatchOptions)
    policy: PolicyOptions = field(default_factory=PolicyOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    measure: MeasureOptions = field(default_factory=MeasureOptions)
    run: RunOptions = field(default_factory=RunOptions)
