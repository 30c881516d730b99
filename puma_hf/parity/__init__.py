"""Whether the forms of one model, such as adapter, merged, saved again and exported, give the same embeddings."""
