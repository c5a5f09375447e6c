"""Compares each family's token ids with the ids of TRL's DPOTrainer. Run by hand with ``make zoo-trl``.

TRL tokenizes the prompt and the whole conversation. After their common tokens, the rest of the conversation is the
response. TRL's response therefore includes white space that the template writes after the end token.
"""

import collections
import sys

import transformers
from test_families import ENCODED, _Clock, load, prompts_of, responses_of, written
from transformers.utils import chat_template_utils
from trl.data_utils import _tokenize, common_prefix_length
from zoo_oracle import conversation_of, messages_of


def compare(name: str) -> collections.Counter[str]:
    """Compares a family's ids with TRL's. Returns the number of cases for each result, such as "equal"."""
    counts: collections.Counter[str] = collections.Counter()
    family, processor, encoder = load(name)
    for turns in prompts_of(family):
        messages = messages_of(processor, turns)
        conversation = conversation_of(messages)
        for text in responses_of(family):
            response = messages_of(processor, [("assistant", written(family, text))])
            kwargs = family.template_kwargs
            prompt = _tokenize(processor, messages, add_generation_prompt=True, **kwargs)["input_ids"]
            whole = _tokenize(processor, messages + response, **kwargs)["input_ids"]
            prompt, whole = ([int(token) for token in ids] for ids in (prompt, whole))
            size = common_prefix_length(prompt, whole)
            encoded = encoder.response(conversation, text)
            ours = encoder.prompt_ids(conversation), encoded.ids
            end = size + len(ours[1])
            if encoded.is_split:
                counts["tokenized apart by us"] += 1
            elif ours[0] == whole[:size] and ours[1] == whole[size:end]:
                counts["equal"] += 1
            elif ours[0] == whole[:size] and ours[1][:-1] == whole[size : end - 1]:
                counts["equal, without the end of the turn"] += 1
            elif ours[0] == whole[:size] and text != text.rstrip():
                counts["merged by TRL with the white space at the end"] += 1
            else:
                counts["different"] += 1
    return counts


def main() -> int:
    transformers.logging.set_verbosity_error()
    chat_template_utils.datetime = _Clock
    total: collections.Counter[str] = collections.Counter()
    for name in ENCODED:
        counts = compare(name)
        total += counts
        print(f"{name:24} " + ", ".join(f"{count} {kind}" for kind, count in counts.most_common()))
    print(f"{'all families':24} " + ", ".join(f"{count} {kind}" for kind, count in total.most_common()))
    return int(total["different"] > 0)


if __name__ == "__main__":
    sys.exit(main())
