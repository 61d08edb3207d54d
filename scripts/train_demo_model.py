"""Trains the demo model that lorashear ships: tokenizer and weights, from the text of `lorashear.data.demo`.

    python scripts/train_demo_model.py --minutes 40 --threads 1

Speed is measured first and the number of steps chosen to fill the minutes; `--steps` (training.json holds those of the
shipped model) makes a run repeatable. Everything is drawn from one seed; the model is written at the end only.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as F
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lorashear.config import DataSettings
from lorashear.data.demo import demo_model_path
from lorashear.data.sources import Source, read_sources, render

SEPARATOR, TURN, END_OF_TURN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
PROMPTS = ("What does `json.dumps` do?", "What is the class `threading.Lock`?", "Describe the function `os.path.join`.")
LOG_EVERY = 50


@dataclass(frozen=True)
class Recipe:
    """What training.json repeats."""

    vocabulary: int = 2048
    window: int = 256
    batch: int = 16
    long_window: int = 1024
    """Every `long_every`-th step has windows of this length and as many tokens, so that late positions are trained."""
    long_every: int = 8
    learning_rate: float = 3e-3
    final_share: float = 0.02
    """Learning rate at the end, as a share of its peak."""
    warmup_steps: int = 100
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    seed: int = 0

    @property
    def tokens_per_step(self) -> int:
        return self.window * self.batch


def train_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE with GPT-2's way of splitting words, which every runtime knows."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[SEPARATOR, TURN, END_OF_TURN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SEPARATOR,
        eos_token=END_OF_TURN,
        pad_token=SEPARATOR,
        model_max_length=Recipe.long_window,
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """The untrained model: 2.8 M parameters, sizes small enough for a laptop and wide enough to be cut."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=32,
        max_position_embeddings=Recipe.long_window,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.convert_tokens_to_ids(SEPARATOR),
        eos_token_id=tokenizer.convert_tokens_to_ids(END_OF_TURN),
        use_cache=True,
    )  # no pad_token_id: it would freeze the separator's row of the embedding
    return LlamaForCausalLM(config)


def tokenize(sources: list[Source], tokenizer: PreTrainedTokenizerFast, side: str) -> dict[str, list[list[int]]]:
    """Source name -> passages as token ids, each with the separator before it."""
    passages = {}
    for source in sources:
        texts = [SEPARATOR + render(row, source, tokenizer, DataSettings()) for row in getattr(source, side)]
        passages[source.name] = [list(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    return passages


def batches(passages: list[list[int]], recipe: Recipe, rng: random.Random) -> Iterator[Tensor]:
    """Windows `(batch, window)`; every epoch joins the passages in a new order, so that no window comes twice."""
    stream: list[int] = []
    step = 0
    while True:
        epoch = passages.copy()
        rng.shuffle(epoch)
        for passage in epoch:
            stream += passage
            while len(stream) >= recipe.tokens_per_step:
                step += 1
                width = recipe.long_window if step % recipe.long_every == 0 else recipe.window
                block, stream = stream[: recipe.tokens_per_step], stream[recipe.tokens_per_step :]
                yield torch.tensor(block).view(-1, width)


def precision(bfloat16: bool) -> AbstractContextManager[object]:
    return torch.autocast("cpu", dtype=torch.bfloat16) if bfloat16 else nullcontext()


def loss_of(model: LlamaForCausalLM, windows: Tensor, *, reduction: str = "mean") -> Tensor:
    """Cross-entropy of windows `(batch, window)`, each of which makes window - 1 predictions; in float32."""
    logits = model(input_ids=windows, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), windows[:, 1:].flatten(), reduction=reduction)


def build_optimizer(model: LlamaForCausalLM, recipe: Recipe) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=recipe.betas, fused=True)


def learning_rate(step: int, steps: int, recipe: Recipe) -> float:
    """Linear warm-up, then a cosine down to `final_share` of the peak."""
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.warmup_steps
    done = (step - recipe.warmup_steps) / max(1, steps - recipe.warmup_steps)
    share = recipe.final_share + (1 - recipe.final_share) * 0.5 * (1 + math.cos(math.pi * done))
    return recipe.learning_rate * share


def train_step(
    model: LlamaForCausalLM, optimizer: torch.optim.AdamW, windows: Tensor, clip: float, bf16: bool
) -> float:
    with precision(bf16):
        loss = loss_of(model, windows)
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def choose_steps(tokenizer: PreTrainedTokenizerFast, recipe: Recipe, options: argparse.Namespace) -> tuple[int, bool]:
    """Number of steps, and whether in bfloat16: as asked for, else by a measurement."""
    if options.steps and options.bfloat16 is not None:
        return options.steps, options.bfloat16
    rates = {bf16: tokens_per_second(tokenizer, recipe, bf16=bf16) for bf16 in (False, True)}
    bf16 = rates[True] > rates[False] if options.bfloat16 is None else options.bfloat16
    print(f"tokens/s: float32 {rates[False]:.0f}, bfloat16 {rates[True]:.0f}", flush=True)
    return options.steps or int(options.minutes * 60 * rates[bf16] / recipe.tokens_per_step), bf16


def tokens_per_second(tokenizer: PreTrainedTokenizerFast, recipe: Recipe, *, bf16: bool) -> float:
    """Speed of training on a model that is thrown away, over whole cycles of short and long windows."""
    model = build_model(tokenizer, recipe.seed)
    optimizer = build_optimizer(model, recipe)
    steps = 2 * recipe.long_every
    noise = [torch.randint(len(tokenizer), (recipe.tokens_per_step,)).tolist() for _ in range(steps + 1)]
    stream = batches(noise, recipe, random.Random(recipe.seed))
    train_step(model, optimizer, next(stream), recipe.clip, bf16)
    start = time.perf_counter()
    for _ in range(steps):
        train_step(model, optimizer, next(stream), recipe.clip, bf16)
    return steps * recipe.tokens_per_step / (time.perf_counter() - start)


def train(model: LlamaForCausalLM, passages: list[list[int]], recipe: Recipe, *, steps: int, bf16: bool) -> None:
    optimizer = build_optimizer(model, recipe)
    stream = batches(passages, recipe, random.Random(recipe.seed))
    model.train()
    start, losses = time.perf_counter(), []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, recipe)
        losses.append(train_step(model, optimizer, next(stream), recipe.clip, bf16))
        if (step + 1) % LOG_EVERY == 0 or step + 1 == steps:
            mean, seconds = sum(losses) / len(losses), time.perf_counter() - start
            rate = (step + 1) * recipe.tokens_per_step / seconds
            print(f"step {step + 1}/{steps} loss {mean:.3f} {rate:.0f} tokens/s {seconds / 60:.1f} min", flush=True)
            losses = []


@torch.no_grad()
def perplexities(
    model: LlamaForCausalLM, passages: dict[str, list[list[int]]], *, window: int, most: int
) -> dict[str, float]:
    """Held-out perplexity per source over at most `most` windows that do not overlap."""
    model.eval()
    found = {}
    for name, parts in passages.items():
        stream = torch.tensor([token for part in parts for token in part])
        windows = stream[: len(stream) // window * window].view(-1, window)[:most]
        total = sum(float(loss_of(model, one, reduction="sum")) for one in windows.unsqueeze(1))
        found[name] = round(math.exp(total / (len(windows) * (window - 1))), 2)
    return found


@torch.no_grad()
def sample(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, question: str) -> str:
    """The answer to one question, the likeliest token at every step."""
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
    )
    ids = torch.tensor([tokenizer(SEPARATOR + chat, add_special_tokens=False)["input_ids"]])
    written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False)
    return str(tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)).strip()


def write(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, report: dict[str, object], out: Path) -> None:
    """Weights as bfloat16 (half the size; float32 is what training wants, and lorashear loads them as that)."""
    model.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id,
        eos_token_id=[model.config.bos_token_id, model.config.eos_token_id],
        pad_token_id=tokenizer.pad_token_id,
    )
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "training.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=40.0, help="training time to fill (default: 40)")
    parser.add_argument("--steps", type=int, help="number of steps, instead of --minutes")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--bfloat16", action=argparse.BooleanOptionalAction, help="default: whichever is faster")
    parser.add_argument("--out", type=Path, default=demo_model_path())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    recipe, settings = Recipe(), DataSettings()

    sources = read_sources("demo", settings)
    texts = [" ".join(row.values()) for source in sources for row in source.train]
    tokenizer = train_tokenizer(texts, recipe.vocabulary)
    passages, held_out = tokenize(sources, tokenizer, "train"), tokenize(sources, tokenizer, "valid")
    sizes = {name: sum(map(len, parts)) for name, parts in passages.items()}
    print(f"training tokens {sizes}, held out { {name: sum(map(len, parts)) for name, parts in held_out.items()} }")

    steps, bf16 = choose_steps(tokenizer, recipe, options)
    model = build_model(tokenizer, recipe.seed)
    untrained = perplexities(model, held_out, window=settings.window, most=settings.eval_windows)
    print(f"{sum(p.numel() for p in model.parameters())} parameters, {steps} steps, untrained perplexity {untrained}")

    start = time.perf_counter()
    train(model, [part for parts in passages.values() for part in parts], recipe, steps=steps, bf16=bf16)
    minutes = (time.perf_counter() - start) / 60
    trained = perplexities(model, held_out, window=settings.window, most=settings.eval_windows)
    samples = {question: sample(model, tokenizer, question) for question in PROMPTS}
    report: dict[str, object] = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": steps,
        "tokens": steps * recipe.tokens_per_step,
        "minutes": round(minutes, 1),
        "threads": options.threads,
        "bfloat16": bf16,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "training_tokens": sizes,
        "held_out_perplexity": {"trained": trained, "untrained": untrained},
        "samples": samples,
        "recipe": asdict(recipe),
    }
    write(model, tokenizer, report, options.out)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
