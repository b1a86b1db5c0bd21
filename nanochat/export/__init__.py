"""Export a trained model: to transformers (and what reads its folders), llama.cpp, and Ollama."""
