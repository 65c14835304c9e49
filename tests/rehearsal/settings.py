"""The shortest settings that still go through all of a method or attack; what is not here is as short as it is."""

SHORT = "method.steps=2 method.ddim_steps=2"
FEW = f"{SHORT} method.batch=1 method.trajectories=1"
METHODS = {
    "adv_unlearn": f"{SHORT} method.warmup=1 method.attack_steps=1 method.trajectories=1 method.retained=2 method.lr=1e-3",
    "age": f"{FEW} method.vocabulary=captions method.nearest=4 method.centres=2 method.lr=1e-3",
    "ap": f"{FEW} method.vocabulary=captions method.nearest=4 method.centres=2 method.lr=1e-3",
    "ca": "method.steps=2 method.batch=2 method.images=2 method.image_steps=2 method.lr=1e-3",
    "dark_miner": f"{SHORT} method.max_loops=1 method.pool=3 method.mine_steps=2 method.images=1 method.lr=0.1",
    "esd": f"{SHORT} method.lr=1e-3",
    "esd_2025": f"{FEW} method.lr=1e-3",
    "fmn": "method.steps=2 method.images=2 method.ddim_steps=2 method.lr=1e-3 method.inversion_steps=1 method.inversion_tokens=1",
    "gie": "method.prompts=2 method.kept=1 method.captions=1 method.scales=[0,-5] method.epochs=3 method.ddim_steps=2",
    "kpop": f"{FEW} method.key_steps=2 method.lr=1e-3",
    "latent_guard": "method.false_positives=0.9 method.concepts=8 method.epochs=1 method.calibrated=20 method.pairs=2 method.batch=8",
    "mace": "method.masks=attention method.images=1 method.image_steps=2 method.steps=2 method.lr=1e-2",
    "mace_naive": "method.masks=whole method.images=1 method.image_steps=2 method.steps=2 method.lr=1e-2",
    "mace_uniform": "method.masks=whole method.images=1 method.image_steps=2 method.steps=2 method.lr=1e-2",
    "output_tuning": f"{FEW} method.lr=1e-3",
    "race": "method.first.steps=2 method.first.ddim_steps=2 method.first.lr=1e-3 method.steps=2 method.attack_steps=1 method.ddim_steps=2 method.lr=1e-3",
    "receler": f"{FEW} method.attack_steps=1 method.rank=4 method.lr=1e-2",
    "sa": "method.steps=2 method.batch=2 method.pictures=2 method.replay=2 method.fim_pictures=1 method.fim_steps=1 method.fim=subsampled "
    "method.fim_batch=1 method.ddim_steps=2 method.lr=1e-3",
    "safe_clip": "method.pairs=4 method.epochs=1 method.batch=4 method.lr=1e-2 method.ddim_steps=2",
    "salun": "method.pictures=2 method.kept=2 method.epochs=1 method.batch=2 method.ddim_steps=2 method.lr=1e-3",
    "speed": "method.vocabulary=[table,chair,lamp,street]",
    "spm": f"{FEW} method.warmup=1 method.restarts=1 method.lr=1e-1",
    "stereo": f"{FEW} method.rounds=1 method.search_steps=1 method.pictures=2 method.inversion_steps=1 method.lr=1e-3",
    "text_tuning": "method.steps=2 method.batch=2 method.lr=1e-3",
}
OWN_CLIP = ("dark_miner", "gie", "safe_clip")
ELSEWHERE = ("checkpoint", "retrained")  # a test of its own; of the embedded world alone
ATTACKS = {
    "cce": "steps=2 batch=2 texts=2 pictures=2 inversions=1 checkpoints=1 trials=1",
    "key_guess": "length=2 steps=2 batch=2 pictures=2 guesses=2",
    "mma_image": "images=2",
    "mma_text": "tokens=2 steps=2 candidates=4 top=4 images=2",
    "p4d": "count=2 steps=2 every=1",
    "p4d_umu": "tokens=1 timesteps=1 iterations=1",
    "probe_guidance": "scales=[2.0] pictures=2 steps=2 batch=2 width=4",
    "probe_inpaint": "images=1",
    "probe_noise": "etas=[1.28] variances=[1.02]",
    "rab": "tokens=2 population=4 generations=2 patience=2",
    "random_prefix": "tokens=1 images=2",
    "seed_search": "images=2",
    "udatk": "tokens=1 timesteps=1 iterations=1",
}


def method(name: str) -> list[str]:
    return [f"method={name}", *METHODS.get(name, "").split()]


def attack(name: str) -> list[str]:
    """An attack on two prompts of the ten classes, as judges.Wording sees them."""
    words = ["target=cat", f"attack=[{name}]", "attacked=2", "world.judges.presence={_target_: judges.WordingShare}"]
    return [*words, *(f"attack.{name}.{option}" for option in ATTACKS[name].split())]
