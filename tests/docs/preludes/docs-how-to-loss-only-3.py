# Names that the block takes as given: logits, and labels of which one is outside of the vocabulary.
import torch

logits = torch.zeros(2, 4, 10)
labels = torch.tensor([[-100, 3, 4, 5], [-100, 3, 10, 5]])
