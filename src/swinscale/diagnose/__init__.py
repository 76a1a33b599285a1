"""Looking at models and runs. Import from the modules: each needs its own extra packages, and training needs just one.

``nonfinite`` finds where a number stopped being finite, ``pictures`` draws images and reconstructions (Pillow), ``plots``
draws measures as SVG (matplotlib), ``report`` writes one self-contained HTML page (jinja2).
"""
