"""The real-world matrix: what people do to models, each row run and compared with an oracle.

    python -m tools.matrix            every row, and the table in docs/compatibility.md
    python -m tools.matrix --only lora    those with a word in their name or title

Each row trains a real model for a few real steps and looks at it with each backend.
"""
