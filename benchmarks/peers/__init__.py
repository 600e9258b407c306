"""Scripts that measure other projects, each run by the Python of that project's own environment.

They import the measured project, torch, datasets and the standard library, and nothing of this one; each prints one
line of JSON. `saelens_collect` and `saelens_stream` want an environment made with

    python3 -m venv saelens
    saelens/bin/pip install torch==2.13.0
    echo torch==2.13.0 > keep.txt
    saelens/bin/pip install -c keep.txt sae-lens transformer-lens
"""
