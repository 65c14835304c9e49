#!/usr/bin/env bash
# transformers 5.23.0, tokenizers 0.23.3: CLIPTokenizer
#
# Decoding a prompt's token ids does not give the prompt back. CLIP's splitting makes every digit and every run of signs a
# word of its own, and decoding puts a space behind each word: "25 cats, 1990s" comes back as "2 5 cats , 1 9 9 0 s". A word
# list that is right for prompts (an age, a year, an abbreviation with dots) therefore finds other things in decoded ids,
# which is all that an optimised prompt has. A check of ids has to join digits and signs again before it looks.
#
# Seen:
#   25 cats, 1990s          -> 2 5 cats , 1 9 9 0 s
#   the u.s.a. in 4k        -> the u . s . a . in 4 k
#   a cat on a mat          -> a cat on a mat
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check transformers==5.23.0 tokenizers==0.23.3 2>/dev/null
"$folder/env/bin/python" - "$folder" <<'PYTHON' 2>/dev/null
import json
import pathlib
import sys

from transformers import CLIPTokenizer

folder = pathlib.Path(sys.argv[1])
printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
letters = [chr(b) if b in printable else chr(256 + i) for i, b in enumerate(sorted(range(256), key=lambda b: (b in printable, b)))]
words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
(folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
(folder / "merges.txt").write_text("#version: 0.2\n")
tokenizer = CLIPTokenizer.from_pretrained(folder)
expected = {
    "25 cats, 1990s": "2 5 cats , 1 9 9 0 s",
    "the u.s.a. in 4k": "the u . s . a . in 4 k",
    "a cat on a mat": "a cat on a mat",
}
same = True
for text, seen in expected.items():
    back = tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True)
    print(f"{text:24}-> {back}")
    same &= back == seen
sys.exit(not same)
PYTHON
