"""Chats: conversations to try, how engines render and answer them."""
