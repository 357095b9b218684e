"""Vision-language-action models: a vision-language model of transformers with our own heads."""
