"""The decoding core: sampling shared by every generator."""
