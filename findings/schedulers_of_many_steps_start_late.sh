#!/usr/bin/env bash
# diffusers 0.42.1: DDIMScheduler, DPMSolverMultistepScheduler with timestep_spacing="leading", as Stable Diffusion's files have it
#
# More sampling steps can mean a start at far less noise. "leading" spaces timesteps by a whole number, rounded down, and counts
# them from 0: DDIM's 501 steps are 500 .. 0, DPM-Solver's 500 steps (it divides by one more) are 500 .. 1, where 50 steps begin
# at 980 and 950. The latents still start as pure noise, which the network is told is half denoised. DPM-Solver's 1000 steps are
# a thousand times timestep 0. Nothing is raised or warned of.
#
# Seen (steps: first timestep, how many different ones):
#   DDIMScheduler 50: 980, 50
#   DDIMScheduler 501: 500, 501
#   DPMSolverMultistepScheduler 50: 950, 50
#   DPMSolverMultistepScheduler 500: 500, 500
#   DPMSolverMultistepScheduler 1000: 0, 1
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check diffusers==0.42.1 torch==2.13.0 numpy 2>/dev/null
"$folder/env/bin/python" - <<'PYTHON' 2>/dev/null
import sys

import diffusers

EXPECTED = {
    ("DDIMScheduler", 50): (980, 50),
    ("DDIMScheduler", 501): (500, 501),
    ("DPMSolverMultistepScheduler", 50): (950, 50),
    ("DPMSolverMultistepScheduler", 500): (500, 500),
    ("DPMSolverMultistepScheduler", 1000): (0, 1),
}
same = True
for (name, steps), expected in EXPECTED.items():
    scheduler = getattr(diffusers, name)(timestep_spacing="leading")
    scheduler.set_timesteps(steps)
    seen = int(scheduler.timesteps[0]), len(scheduler.timesteps.unique())
    print(f"{name} {steps}: {seen[0]}, {seen[1]}")
    same &= seen == expected
sys.exit(not same)
PYTHON
