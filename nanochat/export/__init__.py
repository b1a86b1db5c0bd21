"""Take a trained model elsewhere: transformers (and what reads its folders), llama.cpp, Ollama."""
