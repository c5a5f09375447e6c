# Names that the block takes as given: two pairs in the right order, what the loss said of them, and a tokenizer.
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mpo_ext import mpo_loss

words = ["<end>", "<unk>", "one", "two", "three", "four", "plus", "is", "?", "no"]
tokens = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, "<unk>"))
tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, unk_token="<unk>", eos_token="<end>")
texts = [
    "one plus one ? two <end>",
    "two plus one ? three <end>",
    "one plus one ? four <end>",
    "two plus one ? no <end>",
]
input_ids = torch.tensor([tokenizer.encode(text) for text in texts])
labels = input_ids.masked_fill(torch.arange(6) < 4, -100)
out = mpo_loss(torch.zeros(4, 6, len(words)), labels, torch.zeros(4))
