"""Many runs of the pipeline, each a DVC experiment: python -m sharebasis.sweep"""
