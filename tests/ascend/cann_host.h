// A stand-in for the CANN headers that op_host includes, written from their documented behaviour, so that the definitions,
// the tiling functions and the inference functions compile and run in the tests. Registered objects land in Registry().
#pragma once
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace ge {
using graphStatus = uint32_t;
constexpr graphStatus GRAPH_SUCCESS = 0, GRAPH_FAILED = 0xFFFFFFFF;
enum DataType { DT_FLOAT = 0, DT_FLOAT16 = 1, DT_INT32 = 3, DT_UINT8 = 4, DT_BF16 = 27 };
enum Format { FORMAT_ND = 2 };
}  // namespace ge

namespace fe {
struct PlatFormInfos {
    uint32_t cores;
};
}  // namespace fe

namespace gert {
class Shape {
  public:
    size_t GetDimNum() const { return dims_.size(); }
    void SetDimNum(size_t n) { dims_.resize(n, 0); }
    int64_t GetDim(size_t axis) const { return dims_.at(axis); }
    void SetDim(size_t axis, int64_t value) { dims_.at(axis) = value; }

  private:
    std::vector<int64_t> dims_;
};

struct StorageShape {
    Shape shape;
    const Shape& GetStorageShape() const { return shape; }
};

struct CompileTimeTensorDesc {
    ge::DataType type;
    ge::DataType GetDataType() const { return type; }
};

struct RuntimeAttrs {
    bool exact;
    std::vector<std::string> kinds;  // of the operator's attributes, in the order of its definition
    // The only attribute there is here is the bool "exact"; another index is a bug of the tiling function.
    const bool* GetBool(size_t index) const { return index < kinds.size() && kinds[index] == "bool" ? &exact : nullptr; }
};

struct TilingData {
    uint8_t bytes[256];
    size_t size;
    void* GetData() { return bytes; }
    size_t GetCapacity() const { return sizeof(bytes); }
    void SetDataSize(size_t n) { size = n; }
};

// One class for the three contexts: what a function reads and what it sets.
struct Context {
    std::vector<StorageShape> inputs;
    std::vector<CompileTimeTensorDesc> types;
    RuntimeAttrs attributes;
    fe::PlatFormInfos platform;
    TilingData tiling;
    uint32_t blocks = 0, schedule = 0;
    std::vector<size_t> workspaces;
    Shape outputs[4];
    ge::DataType outputTypes[4] = {ge::DT_FLOAT, ge::DT_FLOAT, ge::DT_FLOAT, ge::DT_FLOAT};

    // Tiling
    const StorageShape* GetInputShape(size_t i) const { return &inputs.at(i); }
    const CompileTimeTensorDesc* GetInputDesc(size_t i) const { return &types.at(i); }
    const RuntimeAttrs* GetAttrs() const { return &attributes; }
    fe::PlatFormInfos* GetPlatformInfo() { return &platform; }
    TilingData* GetRawTilingData() { return &tiling; }
    void SetBlockDim(uint32_t n) { blocks = n; }
    void SetScheduleMode(uint32_t mode) { schedule = mode; }
    size_t* GetWorkspaceSizes(size_t n) {
        workspaces.resize(n);
        return workspaces.data();
    }
};

struct TilingContext : Context {};
struct InferShapeContext : Context {
    const Shape* GetInputShape(size_t i) const { return &inputs.at(i).shape; }
    Shape* GetOutputShape(size_t i) { return &outputs[i]; }
};
struct InferDataTypeContext : Context {
    ge::DataType GetInputDataType(size_t i) const { return types.at(i).type; }
    void SetOutputDataType(size_t i, ge::DataType type) { outputTypes[i] = type; }
};
}  // namespace gert

namespace platform_ascendc {
constexpr uint32_t kSystemWorkspace = 16 * 1024 * 1024;
class PlatformAscendC {
  public:
    explicit PlatformAscendC(fe::PlatFormInfos* infos) : infos_(infos) {}
    uint32_t GetCoreNumAiv() const { return infos_->cores; }
    uint32_t GetLibApiWorkSpaceSize() const { return kSystemWorkspace; }

  private:
    fe::PlatFormInfos* infos_;
};
}  // namespace platform_ascendc

// -- tiling data: fields in the order of their definition, each 4 bytes, as the device reads them -----------------------
namespace optiling {
class TilingDef {
  public:
    size_t GetDataSize() const { return bytes_.size(); }
    void SaveToBuffer(void* to, size_t capacity) const {
        if (bytes_.size() <= capacity) std::memcpy(to, bytes_.data(), bytes_.size());
    }

  protected:
    size_t AddField(size_t size) {
        bytes_.resize(bytes_.size() + size, 0xEE);  // a field that is never set shows
        return bytes_.size() - size;
    }
    std::vector<uint8_t> bytes_;
};
}  // namespace optiling

#define BEGIN_TILING_DATA_DEF(name) class name : public TilingDef { public:
#define TILING_DATA_FIELD_DEF(type, field)                                             \
    void set_##field(type value) { std::memcpy(&bytes_[at_##field], &value, sizeof(type)); } \
    size_t at_##field = AddField(sizeof(type))
#define END_TILING_DATA_DEF }
#define REGISTER_TILING_DATA_CLASS(op, name) \
    static const bool registered_##op##_##name = (cann_host::Registry()[#op].tilingClasses += 1) > 0;

// -- registries ---------------------------------------------------------------------------------------------------------
namespace ops {
enum ParamType { OPTIONAL, REQUIRED };

struct OpParamDef {
    std::string name;
    ops::ParamType presence;
    std::vector<ge::DataType> types;
    std::vector<ge::Format> formats, unknown;
    OpParamDef& ParamType(ops::ParamType p) { return presence = p, *this; }
    OpParamDef& DataType(std::vector<ge::DataType> t) { return types = t, *this; }
    OpParamDef& Format(std::vector<ge::Format> f) { return formats = f, *this; }
    OpParamDef& UnknownShapeFormat(std::vector<ge::Format> f) { return unknown = f, *this; }
};

struct OpAttrDef {
    std::string name, kind;
    ParamType presence;
    int64_t value;
    OpAttrDef& AttrType(ParamType p) { return presence = p, *this; }
    OpAttrDef& Int(int64_t v) { return kind = "int", value = v, *this; }
    OpAttrDef& Bool(bool v) { return kind = "bool", value = v, *this; }
};

struct OpAICoreDef {
    std::vector<std::string> units;
    OpAICoreDef& AddConfig(const char* unit) { return units.push_back(unit), *this; }
};

class OpDef {
  public:
    explicit OpDef(const char*) {}
    OpParamDef& Input(const char* name) { return Add(inputs, name); }
    OpParamDef& Output(const char* name) { return Add(outputs, name); }
    OpAttrDef& Attr(const char* name) { return Add(attributes, name); }
    OpAICoreDef& AICore() { return core; }

    std::vector<std::shared_ptr<OpParamDef>> inputs, outputs;
    std::vector<std::shared_ptr<OpAttrDef>> attributes;
    OpAICoreDef core;

  private:
    template <class T>
    T& Add(std::vector<std::shared_ptr<T>>& list, const char* name) {
        list.push_back(std::make_shared<T>());
        list.back()->name = name;
        return *list.back();
    }
};
}  // namespace ops

namespace cann_host {
struct Entry {
    int tilingClasses = 0;
    std::shared_ptr<ops::OpDef> definition;
    ge::graphStatus (*tiling)(gert::TilingContext*) = nullptr;
    ge::graphStatus (*inferShape)(gert::InferShapeContext*) = nullptr;
    ge::graphStatus (*inferType)(gert::InferDataTypeContext*) = nullptr;
};

inline std::map<std::string, Entry>& Registry() {
    static std::map<std::string, Entry> entries;
    return entries;
}

struct Register {
    explicit Register(const char* op) : entry(&Registry()[op]) {}
    Register& Tiling(ge::graphStatus (*f)(gert::TilingContext*)) { return entry->tiling = f, *this; }
    Register& InferShape(ge::graphStatus (*f)(gert::InferShapeContext*)) { return entry->inferShape = f, *this; }
    Register& InferDataType(ge::graphStatus (*f)(gert::InferDataTypeContext*)) { return entry->inferType = f, *this; }
    Entry* entry;
};
}  // namespace cann_host

#define OP_ADD(op) static const bool added_##op = (cann_host::Registry()[#op].definition.reset(new op(#op)), true)
#define IMPL_OP_OPTILING(op) static const cann_host::Register tiled_##op = cann_host::Register(#op)
#define IMPL_OP_INFERSHAPE(op) static const cann_host::Register inferred_##op = cann_host::Register(#op)
