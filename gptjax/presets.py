"""Settings worth a name, as literals."""

import dataclasses

from gptjax.config import GPTConfig, TrainConfig

GPT2_124M = GPTConfig()
GPT2_RECIPE = TrainConfig(  # nanoGPT's and llm.c's: half a million tokens a step, 300 B in all
    dataset="data/openwebtext",
    tokenizer="gpt2",
    model=GPT2_124M,
    max_iters=600_000,
    batch_size=16,
    batch_tokens=524_288,
    learning_rate=6e-4,
    min_lr=6e-5,
    warmup_iters=2000,
    eval_interval=1000,
    eval_iters=200,
    sample_interval=5000,
    checkpoint_interval=1000,
    out_dir="out/gpt2",
)

SHAKESPEARE_CHAR = GPTConfig(
    n_layer=6, n_head=6, n_embd=384, block_size=256, vocab_multiple=1, bias=False, dropout=0.2
)

QUICKSTART = TrainConfig(
    model=GPTConfig(n_layer=4, n_head=3, n_embd=96, block_size=96, vocab_multiple=1, bias=False),
    max_iters=1300,
    batch_size=8,
    optimizer="muon",
    muon_learning_rate=0.03,
    learning_rate=3e-3,
    min_lr=1.5e-4,
    warmup_iters=100,
    eval_interval=325,
    eval_iters=0,
    log_interval=20,
    sample_interval=325,
    checkpoint_interval=325,
)

# A preset's comment gives command, hardware, time and final loss as measured, and nothing else.
PRESETS = {
    # python train.py: val loss 1.690 to 1.709 on TinyShakespeare (3 seeds), 101 to 115 s in all
    # on 2 CPU cores. In a minute or so many small steps of a small model under muon beat fewer
    # larger ones: runs of 56 to 64 s gave 1.70 at 128 wide, 1.74 with batch 16 at context 128, 1.89
    # under adamw.
    "quickstart": QUICKSTART,
    # python train.py on a CPU that computes in bfloat16: val loss 1.617 on TinyShakespeare (one
    # seed), 70.7 s in all on 2 CPU cores (AVX512_BF16 and AMX); quickstart in float32 took 69.0 s
    # there, to 1.694.
    "quickstart_bf16": dataclasses.replace(
        QUICKSTART,
        model=dataclasses.replace(QUICKSTART.model, n_head=4, n_embd=128, block_size=128),
    ),
    # python train.py shakespeare_char: nanoGPT's preset of this name. Best val loss 1.447 to 1.449
    # (2 seeds) at step 2000, it overfits after. On one H100 1.4697, nanoGPT's best, comes 25.5 s
    # after the command with an empty compile cache and 14.5 with a full one; 5.6 ms a step.
    "shakespeare_char": TrainConfig(
        dataset="tinyshakespeare",
        model=SHAKESPEARE_CHAR,
        max_iters=5000,
        batch_size=64,
        learning_rate=1e-3,
        min_lr=1e-4,
        beta2=0.99,
        out_dir="out/shakespeare_char",
    ),
    # python train.py shakespeare_char_fast: the same model under muon, in more and smaller steps,
    # with dropout that leaves attention to cuDNN. Val loss 1.4697 after 3.5 s of training on one
    # H100, 1.437 at the end after 4.4 s (one seed); compiling and evaluations not counted.
    "shakespeare_char_fast": TrainConfig(
        dataset="tinyshakespeare",
        model=dataclasses.replace(SHAKESPEARE_CHAR, attention_dropout=False),
        max_iters=1200,
        batch_size=32,
        optimizer="muon",
        muon_learning_rate=0.03,
        learning_rate=4e-3,
        schedule="wsd",
        decay_fraction=0.7,
        min_lr=0.0,
        warmup_iters=20,
        eval_interval=120,
        sample_interval=0,
        checkpoint_interval=0,
        out_dir="out/shakespeare_char_fast",
    ),
    # python train.py gpt2 --batch_size=auto: as large a batch as the devices hold. A pass over 64
    # sequences with its update takes 114 ms on one H200; no whole run was measured, and nothing of
    # medium and large
    "gpt2": GPT2_RECIPE,
    # python train.py gpt2_fast --batch_size=auto, on one GPU or on eight, with llm.c's shards of
    # FineWeb (fineweb_train_*.bin, fineweb_val_*.bin) in data/fineweb10B. Not measured: 3.28 at the
    # end, for which llm.c needs 19,560 steps of AdamW, is extrapolated from Muon's published 6,200
    # steps with rotary positions; and the time, 1.9 hours on one H100, from gpt2's speed.
    "gpt2_fast": dataclasses.replace(
        GPT2_RECIPE,
        dataset="data/fineweb10B",
        max_iters=7000,
        batch_size=64,
        optimizer="muon",
        muon_learning_rate=0.02,
        muon_momentum_warmup=300,
        learning_rate=2e-3,
        schedule="wsd",
        decay_fraction=0.5,
        min_lr=0.0,
        warmup_iters=100,
        eval_interval=500,
        eval_iters=160,  # 10.5 million tokens, as many as llm.c's evaluation has
        out_dir="out/gpt2_fast",
    ),
    "gpt2_medium": dataclasses.replace(
        GPT2_RECIPE,
        model=dataclasses.replace(GPT2_124M, n_layer=24, n_head=16, n_embd=1024),
        learning_rate=3e-4,
        min_lr=3e-5,
        out_dir="out/gpt2_medium",
    ),
    "gpt2_large": dataclasses.replace(
        GPT2_RECIPE,
        model=dataclasses.replace(GPT2_124M, n_layer=36, n_head=20, n_embd=1280),
        learning_rate=2.5e-4,
        min_lr=2.5e-5,
        batch_size=8,
        out_dir="out/gpt2_large",
    ),
    # python train.py gpt2_xl: a pass over 8 sequences takes 177 ms on one H100, and 44 GB of it;
    # --batch_size=32 on four takes 203 ms; no whole run was measured
    "gpt2_xl": dataclasses.replace(
        GPT2_RECIPE,
        model=dataclasses.replace(GPT2_124M, n_layer=48, n_head=25, n_embd=1600),
        learning_rate=2e-4,
        min_lr=2e-5,
        batch_size=8,
        out_dir="out/gpt2_xl",
    ),
    # python train.py finetune_gpt2 --init_from=RUN: nanoGPT's recipe on a trained run; not yet
    # measured
    "finetune_gpt2": TrainConfig(
        dataset="tinyshakespeare",
        tokenizer="gpt2",
        init_from="out/gpt2",
        max_iters=20,
        batch_size=1,
        gradient_accumulation_steps=32,
        learning_rate=3e-5,
        min_lr=3e-5,
        schedule="constant",
        warmup_iters=0,
        eval_interval=5,
        eval_iters=40,
        sample_interval=10,
        checkpoint_interval=0,
        out_dir="out/finetune_gpt2",
    ),
}
