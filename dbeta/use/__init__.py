"""Commands for people who have a model, or records, and train nothing: embed, ask, doctor, export."""
