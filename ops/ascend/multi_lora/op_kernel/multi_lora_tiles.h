// Members of colora::MultiLora: what a core computes on its tiles. Included by multi_lora_phase.h inside the class.

    // Widened where the products need it.
    __aicore__ inline void Widen(const LocalTensor<float>& dst, const LocalTensor<T>& src, uint32_t n) {
        if constexpr (kFloat) Muls(dst, src, 1.0f, static_cast<int32_t>(n));
        else Cast(dst, src, RoundMode::CAST_NONE, n);
    }
    // acc (+)= w . x over one stretch of at most 64 columns, for the rows [row, row + rows) of one token's coefficients.
    template <typename W>
    __aicore__ inline void Multiply(const LocalTensor<float>& acc, const LocalTensor<W>& w, const LocalTensor<W>& x, uint32_t row,
                                    uint32_t rows, uint32_t pitch, uint32_t lanes) {
        const BinaryRepeatParams strides{1, 1, 1, 8, static_cast<uint8_t>(pitch * sizeof(W) / 32), 0};
        const bool whole = rank8_ == rank_;  // then the rows of all slices follow each other
        const uint32_t blocks = whole ? 1 : slices_, step = whole ? padded_ : rank8_, filled = whole ? padded_ : rank_;
        for (uint32_t i = 0; i < blocks; ++i) {
            const uint32_t low = row > i * step ? row : i * step, high = Smaller(row + rows, i * step + filled);
            if (low < high) {
                MulAddDst(acc[(low - row) * 64], w[(i * filled + low - i * step) * pitch], x, static_cast<uint64_t>(lanes),
                          static_cast<uint8_t>(high - low), strides);
            }
        }
    }
    // target[r] (+)= sum of w[r] . x over all columns, for the chunk's tokens [t0, t0 + tokens) and the rows [row, row + rows)
    // of each; tokens x rows <= kAccRows. Where there is room, stretches of columns go to several sums in turn.
    template <typename W>
    __aicore__ inline void Products(const LocalTensor<float>& target, const LocalTensor<W>& w, const LocalTensor<W>& x, uint32_t g,
                                    uint32_t t0, uint32_t tokens, uint32_t row, uint32_t rows, uint32_t pitch, uint32_t xPitch, bool add) {
        LocalTensor<float> acc = acc_.template Get<float>(), eighths = eighths_.template Get<float>();
        const uint32_t all = tokens * rows, stretches = (pitch + 63) / 64;
        uint32_t sums = 1;
        while (sums * 2 <= kMostSums && all * sums * 2 <= kAccRows && sums * 4 <= stretches) sums *= 2;
        for (uint32_t s = 0; s < stretches; ++s) {
            if (s % sums == 0) PipeBarrier<PIPE_V>();
            for (uint32_t t = 0; t < tokens; ++t) {
                Multiply(acc[(s % sums * all + t * rows) * 64], w[s * 64], x[RowOf(g, t0 + t) * xPitch + s * 64], row, rows, pitch,
                         Smaller(64, pitch - s * 64));
            }
        }
        PipeBarrier<PIPE_V>();
        BlockReduceSum(eighths, acc, static_cast<int32_t>(all * sums), 64, 1, 1, 8);
        for (uint32_t upper = sums / 2; upper > 0; upper /= 2) {
            PipeBarrier<PIPE_V>();
            Add(eighths, eighths, eighths[upper * all * 8], static_cast<int32_t>(upper * all * 8));
        }
        PipeBarrier<PIPE_V>();
        const LocalTensor<float> result = add ? acc : target;
        BlockReduceSum(result, eighths, static_cast<int32_t>(all / 8), 64, 1, 1, 8);
        if (add) {
            PipeBarrier<PIPE_V>();
            Add(target, target, acc, static_cast<int32_t>(all));
        }
    }
    template <typename W>
    __aicore__ inline void ShrinkTile(const LocalTensor<float>& sums, const LocalTensor<W>& w, const LocalTensor<W>& x, uint32_t g,
                                      uint32_t pitch, uint32_t xPitch, bool add) {
        const uint32_t n = chunks_.size[g], rows = Smaller(padded_, kAccRows), together = padded_ > kAccRows ? 1 : kAccRows / padded_;
        for (uint32_t t = 0; t < n; t += together) {
            const uint32_t tokens = Smaller(together, n - t);
            for (uint32_t row = 0; row < padded_; row += rows) {
                if (t || row || add) ClearAcc(Smaller(kAccRows, kMostSums * tokens * rows));
                Products(sums[t * padded_ + row], w, x, g, t, tokens, row, Smaller(rows, padded_ - row), pitch, xPitch, add);
            }
        }
    }
    __aicore__ inline void ClearAcc(uint32_t rows) {
        PipeBarrier<PIPE_V>();
        Duplicate(acc_.template Get<float>(), 0.0f, static_cast<int32_t>(rows * 64));
    }

    __aicore__ inline void ShrinkChunk(uint32_t g, uint32_t begin, uint32_t end, uint64_t piece) {
        const uint32_t n = chunks_.size[g], rows = slices_ * rank_, most = Tile(rows), together = Together(n);
        const uint64_t bank = static_cast<uint64_t>(chunks_.slot[g]) * rows * hidden_;
        LocalTensor<float> sums = outQueue_.template AllocTensor<float>();
        ClearAcc(kAccRows);
        for (uint32_t b = begin; b < end; b += together) {
            const uint32_t width = Smaller(together, end - b), xPitch = Pitch(width);
            if (!early_) LoadRows(xGm_, g, b, width, hidden_, true);
            early_ = false;
            LocalTensor<T> x;
            for (uint32_t c = b; c < b + width; c += most) {
                const uint32_t columns = Smaller(most, b + width - c), pitch = Pitch(columns);
                LoadWeights(downGm_, bank + c, rows, columns, hidden_);
                if (c == b) x = TakeX((RowOf(g, n - 1) + 1) * xPitch);
                LocalTensor<T> w = weightQueue_.template DeQue<T>();
                if constexpr (kMixed || kFloat) {
                    ShrinkTile(sums, w, x[c - b], g, pitch, xPitch, c != begin);
                } else {
                    LocalTensor<float> wideW = wideWeights_.template Get<float>(), wideX = wideRows_.template Get<float>();
                    PipeBarrier<PIPE_V>();
                    Widen(wideW, w, rows * pitch);
                    ShrinkTile(sums, wideW, wideX[c - b], g, pitch, xPitch, c != begin);
                }
                weightQueue_.FreeTensor(w);
            }
            rowQueue_.FreeTensor(x);
        }
        outQueue_.EnQue(sums);
        sums = outQueue_.template DeQue<float>();
        DataCopyPad(piecesGm_[piece], sums, DataCopyExtParams(1, n * padded_ * 4, 0, 0, 0));
        outQueue_.FreeTensor(sums);
    }
    __aicore__ inline LocalTensor<T> TakeX(uint32_t values) {
        LocalTensor<T> x = rowQueue_.template DeQue<T>();
        if constexpr (!kMixed && !kFloat) {
            PipeBarrier<PIPE_V>();
            Widen(wideRows_.template Get<float>(), x, values);
        }
        return x;
    }

    // The coefficients of a chunk: the sum of their pieces, in pairs.
    __aicore__ inline void AddPieces(uint32_t g, uint32_t turn) {
        const uint32_t each = chunks_.size[g] * padded_, pieces = shrink_.Pieces(g), most = kPieces / each;
        LocalTensor<float> sums = sums_.template Get<float>();
        for (uint32_t p = 0, n = 0; p < pieces; p += n) {
            n = Smaller(most, pieces - p);
            LocalTensor<float> part = pieceQueue_.template AllocTensor<float>();
            DataCopyPad(part, piecesGm_[PieceAt(g, turn, p)], DataCopyExtParams(1, n * each * 4, 0, 0, 0),
                        DataCopyPadExtParams<float>(false, 0, 0, 0.0f));
            pieceQueue_.EnQue(part);
            part = pieceQueue_.template DeQue<float>();
            uint32_t left = n;
            while (left > 2) {
                const uint32_t upper = left / 2;
                PipeBarrier<PIPE_V>();
                Add(part, part, part[(left - upper) * each], static_cast<int32_t>(upper * each));
                left -= upper;
            }
            PipeBarrier<PIPE_V>();
            if (p) {
                Add(sums, sums, part, static_cast<int32_t>(each));
                PipeBarrier<PIPE_V>();
                if (left == 2) Add(sums, sums, part[each], static_cast<int32_t>(each));
            } else if (left == 2) {
                Add(sums, part, part[each], static_cast<int32_t>(each));
            } else {
                Muls(sums, part, 1.0f, static_cast<int32_t>(each));
            }
            pieceQueue_.FreeTensor(part);
        }
    }
    // The coefficients of a slice times its scale, where that is not in up.
    __aicore__ inline void ScaleSums(uint32_t g, uint32_t slice) {
        if (small_) return;
        LocalTensor<float> sums = sums_.template Get<float>();
        const uint32_t n = chunks_.size[g];
        PipeBarrier<PIPE_V>();
        for (uint32_t t = 0; t < (slices_ == 1 ? 1 : n); ++t) {
            const LocalTensor<float> part = sums[t * padded_ + slice * rank8_];
            Muls(part, part, scale_, static_cast<int32_t>((slices_ == 1 ? n : 1) * rank8_));
        }
    }
    // A block of 32 bytes for each coefficient of a slice, of n tokens of a chunk from its t0-th on: rank8_ blocks a token.
    __aicore__ inline void Spread(uint32_t slice, uint32_t t0, uint32_t n) {
        LocalTensor<float> sums = sums_.template Get<float>(), spread = spread_.template Get<float>();
        PipeBarrier<PIPE_V>();
        for (uint32_t t = 0; t < (slices_ == 1 ? 1 : n); ++t) {
            const uint32_t repeats = (slices_ == 1 ? n : 1) * rank8_ / 8;
            Brcb(spread[t * rank8_ * 8], sums[(t0 + t) * padded_ + slice * rank8_], static_cast<uint8_t>(repeats), BrcbRepeatParams{1, 8});
        }
    }

    // y + the coefficients times up, for [begin, end) of one slice; the rows of y lie in their queue.
    __aicore__ inline void ExpandBlock(uint32_t g, uint32_t begin, uint32_t end) {
        const uint32_t n = chunks_.size[g], pitch = Pitch(end - begin), most = Tile(rank_);
        LocalTensor<float> sum = wideRows_.template Get<float>(), acc = acc_.template Get<float>(), spread = spread_.template Get<float>();
        if (n > 1) TakeY(sum, g, pitch);
        for (uint32_t c = begin; c < end; c += most) {
            const uint32_t columns = Smaller(most, end - c), upPitch = Pitch(columns);
            if (!loaded_) LoadUp(g, c, columns);
            if (!ahead_) TakeUp(columns);
            loaded_ = ahead_ = false;
            PipeBarrier<PIPE_V>();
            if (n == 1) {
                AddRanks(acc, up_, spread, upPitch);
                if (c == begin) TakeY(sum, g, pitch);
                PipeBarrier<PIPE_V>();
                Add(sum[c - begin], sum[c - begin], acc, static_cast<int32_t>(upPitch));
            } else {
                const uint32_t atOnce = kSpread / rank8_;
                for (uint32_t t = 0; t < n; t += atOnce) {
                    const uint32_t m = Smaller(atOnce, n - t);
                    if (n > atOnce) Spread(SliceOf(begin), t, m);
                    AddChains(sum[t * pitch + c - begin], acc, spread, m, upPitch, pitch);
                }
            }
            if constexpr (kFloat) weightQueue_.FreeTensor(upTile_);
        }
        PipeBarrier<PIPE_V>();
        LocalTensor<T> out = outQueue_.template AllocTensor<T>();
        if constexpr (kFloat) Muls(out, sum, 1.0f, static_cast<int32_t>(n * pitch));
        else Cast(out, sum, RoundMode::CAST_RINT, n * pitch);
        outQueue_.EnQue(out);
        StoreRows(g, begin, end - begin);
    }
    // The tile of up that was loaded, in float32, if it is small times the scale.
    __aicore__ inline void TakeUp(uint32_t columns) {
        const int32_t values = static_cast<int32_t>(rank_ * Pitch(columns));
        upTile_ = weightQueue_.template DeQue<T>();
        PipeBarrier<PIPE_V>();
        if constexpr (kFloat) {
            up_ = upTile_;
        } else {
            up_ = wideWeights_.template Get<float>();
            Cast(up_, upTile_, RoundMode::CAST_NONE, static_cast<uint32_t>(values));
            weightQueue_.FreeTensor(upTile_);
            PipeBarrier<PIPE_V>();
        }
        if (small_) Muls(up_, up_, scale_, values);
    }
    // The rows of y in float32, in the order of the tokens.
    __aicore__ inline void TakeY(const LocalTensor<float>& sum, uint32_t g, uint32_t pitch) {
        LocalTensor<T> rows = rowQueue_.template DeQue<T>();
        PipeBarrier<PIPE_V>();
        const uint32_t n = chunks_.size[g];
        if (!spaced_) Widen(sum, rows, n * pitch);
        for (uint32_t t = 0; spaced_ && t < n; ++t) Widen(sum[t * pitch], rows[RowOf(g, t) * pitch], pitch);
        rowQueue_.FreeTensor(rows);
    }
    // sum += the ranks' products, in chains of their own as far as acc has room: chains 1.. are rows of acc, columns apart.
    __aicore__ inline void AddChains(const LocalTensor<float>& sum, const LocalTensor<float>& acc, const LocalTensor<float>& spread,
                                     uint32_t n, uint32_t columns, uint32_t apart) {
        uint32_t chains = kChains;
        while ((chains - 1) * n * columns > kAccRows * 64) chains /= 2;
        if (chains > 1) Duplicate(acc, 0.0f, static_cast<int32_t>((chains - 1) * n * columns));
        for (uint32_t j = 0; j < rank_; ++j) {
            if (j % chains == 0) PipeBarrier<PIPE_V>();
            const uint32_t chain = j % chains;
            if (chain) AddRank(acc[(chain - 1) * n * columns], up_[j * columns], spread[j * 8], n, columns, columns);
            else AddRank(sum, up_[j * columns], spread[j * 8], n, columns, apart);
        }
        for (uint32_t left = chains - 1; left > 0; --left) {  // chain by chain: few values
            PipeBarrier<PIPE_V>();
            for (uint32_t c = 0; c < columns; c += 64) {
                Add(sum[c], sum[c], acc[(left - 1) * n * columns + c], static_cast<uint64_t>(Smaller(64, columns - c)), static_cast<uint8_t>(n),
                    BinaryRepeatParams{1, 1, 1, static_cast<uint8_t>(apart / 8), static_cast<uint8_t>(apart / 8), static_cast<uint8_t>(columns / 8)});
            }
        }
    }
    // sum[t] += coefficient[t] * row for all tokens; rows of sum lie `apart`.
    __aicore__ inline void AddRank(const LocalTensor<float>& sum, const LocalTensor<float>& row, const LocalTensor<float>& coefficient,
                                   uint32_t n, uint32_t columns, uint32_t apart) {
        for (uint32_t c = 0; c < columns; c += 64) {
            MulAddDst(sum[c], row[c], coefficient, static_cast<uint64_t>(Smaller(64, columns - c)), static_cast<uint8_t>(n),
                      BinaryRepeatParams{1, 1, 0, static_cast<uint8_t>(apart / 8), 0, static_cast<uint8_t>(rank8_)});
        }
    }
    // acc = sum over the ranks of coefficient * row, for one token: all products at once, then halves of the rows.
    __aicore__ inline void AddRanks(const LocalTensor<float>& acc, const LocalTensor<float>& up, const LocalTensor<float>& coefficients,
                                    uint32_t pitch) {
        for (uint32_t j = 0; j < rank_; j += 128) {
            for (uint32_t c = 0; c < pitch; c += 64) {
                Mul(acc[j * pitch + c], up[j * pitch + c], coefficients[j * 8], static_cast<uint64_t>(Smaller(64, pitch - c)),
                    static_cast<uint8_t>(Smaller(128, rank_ - j)),
                    BinaryRepeatParams{1, 1, 0, static_cast<uint8_t>(pitch / 8), static_cast<uint8_t>(pitch / 8), 1});
            }
        }
        uint32_t upper = 1, rows = rank_;
        while (upper * 2 < rank_) upper *= 2;
        for (; rows > 1; upper /= 2) {
            PipeBarrier<PIPE_V>();
            Add(acc, acc, acc[upper * pitch], static_cast<int32_t>((rows - upper) * pitch));
            rows = upper;
        }
    }
    __aicore__ inline void StoreRows(uint32_t g, uint32_t column, uint32_t columns) {
        const uint32_t pitch = Pitch(columns), first = chunks_.first[g], n = chunks_.size[g];
        LocalTensor<T> out = outQueue_.template DeQue<T>();
        uint32_t step = 1;
        for (uint32_t i = 0, run = 0; i < n; i += run) {
            run = Run(g, i, step);
            DataCopyPad(outGm_[static_cast<uint64_t>(chunks_.order[first + i]) * width_ + column], out[i * pitch],
                        DataCopyExtParams(static_cast<uint16_t>(run), columns * sizeof(T), 0, (step * width_ - columns) * sizeof(T), 0));
        }
        outQueue_.FreeTensor(out);
    }
