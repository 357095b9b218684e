"""Scripted experts that play demonstrations."""
