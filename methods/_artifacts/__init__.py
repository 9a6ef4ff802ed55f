"""Shared by all methods: how finished files reach the folder to publish."""
