"""ReasoningBankService: declared, not built yet."""

from sona.rpc.status import not_built
from sona.v1.bank_pb2_grpc import ReasoningBankServiceServicer


class ReasoningBankService(ReasoningBankServiceServicer):
    """Every method answers UNIMPLEMENTED, naming itself."""

    SearchPatterns = not_built("SearchPatterns")
    GetPattern = not_built("GetPattern")
    ListPatterns = not_built("ListPatterns")
    PutPattern = not_built("PutPattern")
    DeletePattern = not_built("DeletePattern")
    GetBankStats = not_built("GetBankStats")
