"""Tables of prompts and captions, laid out as they are published; every text of them is harmless."""

from __future__ import annotations

import json
from pathlib import Path

PROMPTS = ("a quiet lake at dawn", "two chairs, a table and a lamp", "a bowl of fruit, oil on canvas", "an old railway station")
I2P = (  # of the hub's dataset
    "prompt,categories,hard,inappropriate_percentage,nudity_percentage,q16_percentage,sd_safety_percentage,prompt_toxicity,"
    "lexica_url,sd_seed,sd_guidance_scale,sd_image_width,sd_image_height,sd_model"
)
UNSAFE = (  # of the copy that ESD's repository has of it
    ",case_number,prompt,evaluation_seed,evaluation_guidance,categories,hard,inappropriate_percentage,nudity_percentage,"
    "q16_percentage,sd_safety_percentage,prompt_toxicity,lexica_url"
)


def write_tables(folder: Path) -> None:
    """Every layout, each as one file of `folder`."""
    folder.mkdir()
    i2p = [f'"{text}","shocking, hate",0,12.5,0.0,7.5,1.0,0.1,https://example.org/{n},{1000 + n},7,512,512,1.4' for n, text in enumerate(PROMPTS)]
    unsafe = [f'{n},{n},"{text}",{2000 + n},7.5,shocking,0,12.5,0.0,7.5,1.0,0.1,https://example.org/{n}' for n, text in enumerate(PROMPTS)]
    people = [("erased", "Adam Driver"), ("preserved", "Aaron Paul"), ("erased", "Adam Driver"), ("preserved", "Alec Baldwin")]
    celebrity = [f"{n},{kind},A portrait of {name},{3000 + n}" for n, (kind, name) in enumerate(people)]
    coco = [f'{n},coco,"{text}",{4000 + n},{500 + n}' for n, text in enumerate(PROMPTS)]
    attack = [f"{n},{n},a photo of a church,{5000 + n},7.5,church" for n in range(3)]
    texts = {
        "i2p.csv": [I2P, *i2p],
        "unsafe-prompts4703.csv": [UNSAFE, *unsafe],
        "mace_celebrity.csv": [",type,prompt,evaluation_seed", *celebrity],
        "coco_30k.csv": ["case_number,source,prompt,evaluation_seed,coco_id", *coco],
        "unlearn_diff_atk.csv": [",case_number,prompt,evaluation_seed,evaluation_guidance,class", *attack],
        "captions.txt": [f"{text}, number {n}" for n in range(40) for text in PROMPTS],
    }
    for name, lines in texts.items():
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    pictures = [{"id": 900 + n, "file_name": f"{n:012}.jpg", "height": 480, "width": 640} for n in range(80)]
    notes = [{"image_id": 900 + n % 80, "id": n, "caption": f"{PROMPTS[n % 4]}, number {n}"} for n in range(160)]
    made = {"info": {"year": 2014}, "images": pictures, "licenses": [], "type": "captions", "annotations": notes}
    (folder / "captions_val2014.json").write_text(json.dumps(made))
