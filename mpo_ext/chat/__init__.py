"""Turns conversations into token ids. Training, sampling and evaluation all use this package."""

from mpo_ext.chat.conversation import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER, Conversation, chat_messages
from mpo_ext.chat.encoder import ChatEncoder, EncodedResponse
from mpo_ext.chat.template import ChatError, find_chat_template

__all__ = [
    "IMAGE_PLACEHOLDER",
    "VIDEO_PLACEHOLDER",
    "ChatEncoder",
    "ChatError",
    "Conversation",
    "EncodedResponse",
    "chat_messages",
    "find_chat_template",
]
