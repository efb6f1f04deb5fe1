from .run import confirm as confirm
from .view import result_lines as result_lines
from .view import status_lines as status_lines
from .wanted import ConfirmRequest as ConfirmRequest
from .within import confirm_within as confirm_within
