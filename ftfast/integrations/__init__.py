"""Use of ftfast inside other people's trainers."""
