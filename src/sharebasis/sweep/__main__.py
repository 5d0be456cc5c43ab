"""python -m sharebasis.sweep -m split=none,heads fit=svd_llm,basis_sharing fit.removed=0.2,0.3"""

from __future__ import annotations

from sharebasis.sweep.app import main

if __name__ == "__main__":
    main()
