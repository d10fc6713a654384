"""nanoGPT's flags and config files that gptjax does not have, and what to use instead."""

from pathlib import PurePath

from gptjax import programs

FLAGS = {
    "device": "JAX takes the GPU or TPU that it finds; set JAX_PLATFORMS=cpu to compute on the CPU",
    "compile": "gptjax always compiles; leave the flag out",
    "eval_only": (
        "take train.py --init_from=RUN --out_dir=NEW --max_iters=0, which evaluates that model on "
        "the validation split and ends"
    ),
    "decay_lr": "the learning rate decays by --schedule=cosine; take --schedule=constant for none",
    "wandb_log": "losses go to metrics.jsonl and loss.png in the run folder; leave the flag out",
    "backend": "JAX finds its devices and processes by itself; leave the flag out",
    "always_save_checkpoint": "take --checkpoint_interval; the newest and the best step are kept",
}
FLAGS |= dict.fromkeys(("wandb_project", "wandb_run_name"), FLAGS["wandb_log"])

CONFIGS = {  # nanoGPT's file in config/ -> what does the same here
    "train_shakespeare_char": "python train.py shakespeare_char",
    "train_gpt2": "python train.py gpt2",
    "finetune_shakespeare": "python train.py finetune_gpt2 --init_from=gpt2-xl",
    "eval_gpt2": "python train.py finetune_gpt2 --init_from=gpt2 --max_iters=0",
    "eval_gpt2_medium": "python train.py finetune_gpt2 --init_from=gpt2-medium --max_iters=0",
    "eval_gpt2_large": "python train.py finetune_gpt2 --init_from=gpt2-large --max_iters=0",
    "eval_gpt2_xl": "python train.py finetune_gpt2 --init_from=gpt2-xl --max_iters=0",
}


def config_file_problem(word: str) -> str | None:
    """Return the message for a word that names a Python file of settings, None for any other."""
    if not word.endswith(".py"):
        return None
    instead = CONFIGS.get(PurePath(word).stem)
    if instead:
        instead = instead.replace("python train.py", programs.command("train.py"))
        return f"{word}: settings are presets and flags here; take {instead}"
    return f"{word}: settings are flags here, or a preset in gptjax/presets.py"
