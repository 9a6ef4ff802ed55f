"""One vector for a whole text: embeddings, and logits of classifiers and rerankers."""
