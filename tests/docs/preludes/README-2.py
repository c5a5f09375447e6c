# Names that the block takes as given: a model and its reference, and a batch of four pairs.
import copy

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

torch.manual_seed(0)
config = Qwen2Config(vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                     num_key_value_heads=2)  # fmt: skip
model = Qwen2ForCausalLM(config)
ref_model = copy.deepcopy(model)
input_ids = torch.randint(100, (8, 16))
attention_mask = torch.ones_like(input_ids)
labels = input_ids.masked_fill(torch.arange(16) < 6, -100)
