"""Every configuration key with its default, which is that of the released recipe if it has one."""

import hashlib
import json
from typing import Annotated, Literal

from pydantic import Field, JsonValue

from pipeline.config.learnt import learnt
from pipeline.settings import FromMapping, Place, Section
from shards.samples.decode import Limits
from shards.views.augment import Fraction, ImageAugment

# Every number has both bounds: what is beyond them fails later, in the middle of a run.
Beta = Annotated[float, Field(ge=0, lt=1)]
Rate = Annotated[float, Field(ge=0, le=100)]
Count = Annotated[int, Field(ge=0, le=10**9)]
Positive = Annotated[int, Field(gt=0, le=10**9)]
Epochs = Annotated[int, Field(ge=0, le=10**6)]
Batch = Annotated[int, Field(gt=0, le=10**7)]
Amount = Annotated[float, Field(ge=0, le=1e9)]
PositiveAmount = Annotated[float, Field(gt=0, le=1e9)]
Channel = Annotated[float, Field(ge=0, le=1)]
Deviation = Annotated[float, Field(gt=0, le=1)]


class Source(Section):
    index: Place
    """Folder written by `safeclip index`."""
    weight: Annotated[int, Field(gt=0, le=10**6)] = 1
    """How often each of its samples is seen in an epoch."""


class Run(Section):
    """The run directory, saving and resuming."""

    dir: Place = ""
    """Run directory: everything the run writes."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of the weights, the order and the augmentation."""
    timeout: Annotated[float, Field(ge=1, le=1e9)] = 50.0
    """Seconds without a sign of life of a process after which the others end; one that works for long gives signs."""
    save_steps: Count = 0
    """Save after every so many steps, and at every epoch's end; 0 = only there."""
    save_minutes: Amount = 0.0
    """Save also when the last save is so many minutes ago; 0 = never."""
    keep: Positive = 2
    """Newest complete checkpoints to keep, and selection rounds whose scores are kept. All masks are."""
    keep_every: Count = 0
    """Keep also the checkpoint at the end of every n-th epoch; 0 = none. The steps before the first selection round
    count as one."""
    restart: bool = False
    """Delete the state of the run directory and start from the beginning."""
    accept_changes: bool = False
    """Continue a run although the config has changed."""


class Data(Section):
    """What is read, and how it is augmented."""

    index: Place = ""
    """Folder written by `safeclip index`."""
    sources: dict[str, Source] | None = None
    """Or several: {NAME: {index: FOLDER, weight: 2}, ...}. A weight of 2: each of its samples is seen twice an epoch.
    Default 1."""
    cache: Place | None = None
    """Folder for copies of shards from behind URLs, on a disk of the host's own; null: one in the folder for temporary
    files."""
    cache_gb: PositiveAmount = 100.0
    """Size of that folder in GB (1e9 bytes), at most."""
    remote_timeout: PositiveAmount = 120.0
    """Seconds without data after which a server is an error; requests are retried until then."""
    allow_pipe: bool = False
    """Run the shell commands of shards that are named `pipe:COMMAND`."""
    overlay: Place | None = None
    """Folder written by `safeclip attack`: poison applied while reading, or null."""
    workers: Annotated[int, Field(ge=0, le=1024)] = 2
    """Reading processes of each rank; 0 reads in the training process."""
    streams: Batch = 8
    """Parts of the data that a batch is drawn from. Must divide train.batch_size; not tied to the number of ranks."""
    window: Positive = 4096
    """Samples among which a stream is shuffled."""
    limits: Annotated[Limits, FromMapping()] = Limits()
    """A sample above one of these limits is bad: max_bytes, max_pixels, max_caption."""
    max_bad_fraction: Fraction = 0.01
    """The run stops if more than this fraction of the samples that it read are bad; 1 = never."""
    clip_augment: Annotated[ImageAugment, FromMapping()] = ImageAugment()
    """Augmentation of the picture for the CLIP loss."""
    unimodal_augment: Annotated[ImageAugment, FromMapping()] = ImageAugment()
    """Augmentation of both views for the unimodal loss."""
    augment_on: Literal["worker", "device"] = "worker"
    """Where colour augmentation runs: worker (the reading process) or device (on the batch); equal up to rounding."""
    clip_eda: Fraction = 0.1
    """Strength of EDA for the CLIP loss: the fraction of a caption's words that it changes; 0 = captions as they
    are."""
    unimodal_eda: Fraction = 0.1
    """Strength of EDA for the unimodal loss."""
    eda_synonyms: Literal["wordnet", "table"] = "wordnet"
    """Where EDA takes synonyms from: wordnet, or table, the small table of this package (also used where WordNet is not
    installed)."""
    eda_clean: bool = True
    """EDA gives lower-case captions without punctuation."""
    eda_once: bool = True
    """The variants of a caption are drawn once for the whole run; false: in every epoch."""
    mask: Place | None = None
    """Folder of a saved mask: the run trains only on its safe pairs, and each epoch is filled up with them. Not for
    train.method safeclip."""


class Model(Section):
    """The CLIP model."""

    name: str | None = None
    """An open_clip architecture: RN50, ViT-B-32, ViT-B-16 ..."""
    config: dict[str, JsonValue] | None = None
    """Or an open_clip model config: embed_dim, vision_cfg, text_cfg; with custom_text a CustomTextCLIP, and with
    init_logit_bias a model with the sigmoid loss (SigLIP)."""
    pretrained: Place | None = None
    """Start from the weights of this run directory (its newest checkpoint), open_clip local directory, or file
    (.safetensors, .pt, .pth, .bin); null: from random weights."""
    lock_image: bool = False
    """Freeze the image tower of model.pretrained (LiT, Zhai et al. 2022)."""
    lock_text: bool = False
    """Freeze the text tower of model.pretrained."""
    mean: Annotated[list[Channel], Field(min_length=3, max_length=3)] | None = None
    """Mean of the red, green and blue pixels in 0..1 by which pictures are normalised; null: that of the model's family
    (0.5 for SigLIP)."""
    std: Annotated[list[Deviation], Field(min_length=3, max_length=3)] | None = None
    """Their standard deviation."""
    patch_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Fraction of a picture's patches that a vision transformer leaves out in training, drawn anew in every step (FLIP,
    Li et al. 2023; open_clip's patch_dropout). Scoring and evaluation see all."""


class Train(Section):
    """Curriculum, optimizer and precision."""

    method: Literal["safeclip", "clip", "roclip", "cleanclip"] = "safeclip"
    """safeclip; clip: plain CLIP on all pairs; roclip or cleanclip: other published defences
    (pipeline/training/curriculum.py)."""
    epochs: Annotated[int, Field(gt=0, le=10**6)] = 32
    """All epochs, warm-up included."""
    unimodal_epochs: Epochs = 5
    """Epochs of unimodal warm-up."""
    low_rate_epochs: Epochs = 1
    """Epochs of the CLIP loss at low_rate_lr, on all pairs."""
    steps_before_selection: Count | None = 0
    """Steps of plain CLIP on all pairs before the first selection round, at the rates of the warm-up to the middle and
    back; null: 8 * sqrt(warmup_steps), whose rates add up to those of 16 steps at the full rate. At most a quarter of
    the run."""
    batch_size: Batch = 128
    """Pairs of a global batch, over all ranks."""
    accumulate: Positive = 1
    """Parts in which a process forwards its rows of a batch, to hold the activations of one part only. The loss is that
    of the whole batch (GradCache, Gao et al. 2021); each part is forwarded twice."""
    checkpoint_activations: bool = False
    """Blocks of the towers keep their inputs only, and are calculated again in the backward pass: less memory, a step
    is about a third longer (Chen et al. 2016; open_clip's --grad-checkpointing)."""
    compile: bool = False
    """torch.compile of both towers. The first steps take minutes longer. Not at train.zero_stage 3."""
    clip_views: int = Field(default=2, ge=1, le=2)
    """Views of each pair in the CLIP loss. 2: picture view 1 with caption view 2, and caption view 1 with picture view
    2; or 1."""
    lr: Rate = 5e-4
    """Highest learning rate."""
    low_rate_lr: Rate = 5e-6
    """Learning rate of the low-rate CLIP epochs."""
    warmup_steps: Count = 10_000
    """Steps of linear warm-up to lr."""
    schedule: Literal["released", "run"] = "released"
    """run: one linear warm-up and one cosine over the run. released: one over the warm-up epochs and one after them,
    with the counters of the released code."""
    weight_decay: Rate = 0.1
    """Weight decay of AdamW."""
    beta1: Beta = 0.9
    """Decay of AdamW's mean of the gradient."""
    beta2: Beta = 0.999
    """Decay of AdamW's mean of the squared gradient."""
    eps: Annotated[float, Field(ge=0, le=1)] = 1e-8
    """Added to the denominator of AdamW."""
    clip: Amount = 0.0
    """Gradient norm above which gradients are clipped; 0 = off."""
    average: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay of an exponential moving average of the weights, which is evaluated and exported in their place; 0: off."""
    precision: Literal["fp32", "bf16", "auto"] = "fp32"
    """Number format of the forward and backward pass; auto: bf16 where all processes have a GPU that calculates in it,
    else fp32."""
    zero_stage: int = Field(default=1, ge=0, le=3)
    """DeepSpeed ZeRO stage. A run that one process begins in fp32 is at 0: there is nothing to share out."""
    on_nan: Literal["stop", "skip"] = "stop"
    """If a gradient is infinite or NaN: stop, or skip the step and count it."""
    support_queue: Batch = 256
    """Size of the support queue of each modality: past embeddings that are searched for the nearest neighbour."""
    profile: Annotated[int, Field(ge=0, le=1)] = 0
    """1: ten steps of rank 0, soon after the start, are traced by torch.profiler: RUN/profile; 0 = off."""
    match_every: Positive = 2
    """roclip: in every n-th epoch a picture is matched with the nearest caption of the support queue."""

    @property
    def betas(self) -> tuple[float, float]:
        return (self.beta1, self.beta2)


class Selection(Section):
    """Scoring and selection rounds."""

    posterior: Fraction = 0.9
    """First safe set: pairs in which the higher component of the mixture has at least this posterior."""
    first_fraction: Fraction | None = None
    """Safe fraction of the pairs in the first round; null: by the posterior."""
    least_fraction: Fraction = 0.0
    """Lower bound of the first fraction when the posterior gives it."""
    mixture: Literal["sklearn", "converged"] = "sklearn"
    """How the mixture is fitted. sklearn: its GaussianMixture at default tolerance, on all scores in memory; converged:
    EM to the maximum, on a histogram (pipeline/safety/mixture.py)."""
    rank_by: Literal["posterior", "score"] = "posterior"
    """What pairs are ranked by: posterior, which is not monotone in the score; or score."""
    scored_view: Literal["augmented", "plain"] = "augmented"
    """The view of a pair that is scored: augmented, the first view of the CLIP loss; or plain."""
    growth: Fraction = 0.01
    """Growth of the safe fraction with each later epoch."""
    max_fraction: Fraction = 0.85
    """Largest safe fraction after the first round. All fractions are of the pairs that no guard excludes."""
    negative_controls: Count = 500
    """Number of mismatched pairs that are scored in every round and never trained on, at most half of the pairs; 0 =
    none."""
    every: Positive | None = 1
    """Selection round before every n-th SafeCLIP epoch; null: before number 0, 2, 6, 14, ... of them, as long as at
    least as many epochs follow as were before. The safe fraction grows with the epochs, also between rounds."""
    risky: Literal["unimodal", "skip"] = "unimodal"
    """Loss of risky pairs: unimodal, or skip (not trained on)."""
    refill: bool = False
    """Repeat passes over the safe set until the epoch has as many steps as one over all pairs."""
    batch_size: Batch = 512
    """Pairs that one rank scores at a time."""


class Evaluation(Section):
    """What is evaluated, and when."""

    evaluators: list[str] | None = None
    """Which of loss, retrieval, zero_shot and attacks are run; null: all for which there are data."""
    pairs: Place | None = None
    """Index of held-out shards with captions, for loss and retrieval. Labels are not needed. A training shard among
    them is an error."""
    max_pairs: Annotated[int, Field(gt=0, le=100_000)] = 20_000
    """Only so many of them are used, the first ones. The time of retrieval grows with their square."""
    test: Place | None = None
    """Folder with classnames.txt, zeroshot_classification_templates.txt and test/ (CLIP_benchmark layout), or null: for
    zero_shot, attacks and, where it has captions, retrieval."""
    index: Place | None = None
    """Index of the shards of that folder (text="cls")."""
    labels: Place | None = None
    """Index of the training shards with text="cls", for the linear probe; null: the folder `labels` beside data.index,
    where it is there."""
    every: Count = 1
    """Evaluate after every n-th epoch; 0 = only at the end. The steps before the first selection round count as one,
    which is not evaluated."""


class Wandb(Section):
    mode: Literal["disabled", "offline", "online"] = "disabled"
    """Whether and how metrics are logged to Weights & Biases."""
    project: str = "safeclip"
    """Name of the project in Weights & Biases."""
    name: str | None = None
    """Name of the run there; null: that of the run directory."""
    tags: list[str] = []
    """Tags of the run there."""


class TensorBoard(Section):
    enabled: bool = False
    """Whether metrics are also written for TensorBoard, to RUN/tensorboard. Needs the package tensorboard."""


class Config(Section):
    """All keys of a config file."""

    preset: Literal["paper", "paper_fixed", "default", "clip", "roclip", "cleanclip"] = "paper"
    """paper (the released recipe), paper_fixed (without its faults), default (this project's recipe), clip (plain
    CLIP), roclip or cleanclip (other published defences); the keys below override it."""
    run: Run = Run()
    data: Data = Data()
    model: Model = Model()
    train: Train = Train()
    selection: Selection = Selection()
    guards: dict[str, dict[str, JsonValue] | None] = {}
    """Guards, which exclude pairs from all safe sets: {NAME: {setting: value}}, NAME: null is off (pipeline/guards)."""
    evaluation: Evaluation = Evaluation()
    wandb: Wandb = Wandb()
    tensorboard: TensorBoard = TensorBoard()

    def hash(self) -> str:
        """12 hex digits of the keys that affect the trained model."""
        return hashlib.sha256(json.dumps(learnt(self.model_dump()), sort_keys=True).encode()).hexdigest()[:12]
