"""Trains a small model of any shape on one's own text, so that a ranking of methods can be checked on another architecture.

    python scripts/train_bench_model.py TOKENIZER DATA --type qwen3 --out models/qwen3 --tokens 8000000 --threads 1 \\
      --set hidden_size=160 intermediate_size=448 num_hidden_layers=7 num_attention_heads=5 num_key_value_heads=5 \\
            head_dim=32 tie_word_embeddings=false

TOKENIZER is a folder with a tokenizer, DATA whatever `--data` of lorashear takes. TYPE is a `model_type` of transformers,
and `--set` gives values of its configuration. AdamW at 3e-3 on a cosine, 16 windows a step, sources in proportion to
their sizes; everything is drawn from one seed. The model is written at the end only, with its held-out perplexity.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lorashear.config import DataSettings
from lorashear.data.packing import TokenData, tokenize
from lorashear.data.sources import read_sources
from lorashear.evaluation.perplexity import evaluate_perplexity
from lorashear.recovery.mixture import MixtureDataset, proportional_weights
from lorashear.training import TrainJob, TrainResult, cosine_to, train

RATE, BATCH, WARMUP, WEIGHT_DECAY = 3e-3, 16, 100, 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("data")
    parser.add_argument("--type", default="qwen3", help="model_type of transformers")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="values of the configuration")
    parser.add_argument("--render", default="auto", help="how instruction rows become text (data.render)")
    parser.add_argument("--tokens", type=int, default=8_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bfloat16", action="store_true")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    settings = DataSettings.from_mapping({"render": options.render})
    data = tokenize(read_sources(options.data, settings), tokenizer, settings)
    model = build(tokenizer, options.type, dict(item.split("=", 1) for item in options.set), options.seed)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    result = fit(model, data, options)
    found = evaluate_perplexity(model, data)
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    report = {**asdict(result), "held_out_perplexity": found.to_dict()}
    (options.out / "training.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"held-out macro perplexity {found.macro:.2f} after {result.tokens:,} tokens, {result.seconds / 60:.0f} min")


def build(tokenizer: PreTrainedTokenizerBase, model_type: str, values: dict[str, str], seed: int) -> PreTrainedModel:
    """The untrained model; `values` are read as YAML, so `false` and `0.1` are what they look like."""
    torch.manual_seed(seed)
    read = {key: yaml.safe_load(value) for key, value in values.items()}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = AutoConfig.for_model(model_type, **{"vocab_size": len(tokenizer), **ends, **read})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def fit(model: PreTrainedModel, data: TokenData, options: argparse.Namespace) -> TrainResult:
    """All weights; decay on the matrices alone."""
    steps = max(1, options.tokens // (BATCH * data.window))
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95))
    mixture = MixtureDataset(
        data.sources, proportional_weights(data.sources), num_samples=steps * BATCH, seed=options.seed
    )
    job = TrainJob(
        name="pretrain", steps=steps, batch=BATCH, micro_batch=BATCH, seed=options.seed, out=options.out,
        dtype=torch.bfloat16 if options.bfloat16 else None,
    )  # fmt: skip
    schedule = cosine_to(optimizer, steps=steps, warmup_steps=WARMUP)
    return train(model, mixture, optimizer=optimizer, scheduler=schedule, job=job)


if __name__ == "__main__":
    main()
