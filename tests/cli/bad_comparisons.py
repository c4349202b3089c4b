TABLE = ()
Bad = None
