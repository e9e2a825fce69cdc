"""What MindSpore's custom operators ask of the chip, without one: the place of ``MSContext`` in their module."""


class Chip:
    @staticmethod
    def get_instance():
        return Chip

    @staticmethod
    def get_ascend_soc_version():
        return "ascend910b"
